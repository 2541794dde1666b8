"""The residual MLPs against the modules of PyTorch that they are written down with, and how they are drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuclip.normalizers import ResidualMLPs

DIM, HIDDEN = 5, 7


def from_modules(mlps: ResidualMLPs, modality: int, anchors: Tensor) -> Tensor:
    """λ of one modality through nn.Linear and nn.LayerNorm with that modality's weights."""
    into, back, out = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), nn.Linear(DIM, 1)
    hidden_norm, back_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(DIM)
    parts = mlps.named_parts(mlps.weights)
    for name, module in (
        ("linear_1", into),
        ("linear_2", back),
        ("linear_3", out),
        ("norm_1", hidden_norm),
        ("norm_2", back_norm),
    ):
        module.to(anchors.dtype)
        module.weight.data.copy_(parts[f"{name}.weight"][modality].view(module.weight.shape))
        module.bias.data.copy_(parts[f"{name}.bias"][modality].view(module.bias.shape))
    residual = back_norm(back(hidden_norm(into(anchors).relu())).relu()) + anchors
    return out(residual.relu())[:, 0]


def test_outputs_equal_those_of_the_modules() -> None:
    generator = torch.Generator().manual_seed(3)
    mlps = ResidualMLPs(DIM, HIDDEN).double()
    for buffer in mlps.buffers():
        # Not at the beginning, where gains are 1 and shifts 0.
        buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
    anchors = torch.randn(2, 9, DIM, generator=generator).double()
    outputs = mlps(anchors)
    assert outputs.shape == (2, 9)
    for modality in range(2):
        torch.testing.assert_close(outputs[modality], from_modules(mlps, modality, anchors[modality]).detach())


def test_weights_are_buffers_stacked_per_modality_and_drawn_from_their_own_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    mlps, others = ResidualMLPs(DIM, HIDDEN), ResidualMLPs(DIM, HIDDEN)
    assert list(mlps.parameters()) == []
    assert all(buffer.shape[0] == 2 for buffer in mlps.buffers())
    mlps.reinitialise(1)
    others.reinitialise(2)
    parts = mlps.named_parts(mlps.weights)
    first = parts["linear_1.weight"]
    assert not torch.equal(first, others.named_parts(others.weights)["linear_1.weight"])
    assert not torch.equal(first[0], first[1])
    others.reinitialise(1)
    assert torch.equal(mlps.weights, others.weights)
    assert torch.equal(torch.rand(3), expected)
    # As nn.Linear: uniform within ±1/√(inputs).
    assert 0.8 * DIM**-0.5 < first.abs().max() <= DIM**-0.5
    assert 0.8 * HIDDEN**-0.5 < parts["linear_2.weight"].abs().max() <= HIDDEN**-0.5
