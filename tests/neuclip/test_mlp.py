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
    for module, weight, bias in (
        (into, mlps.weight_in, mlps.bias_in),
        (back, mlps.weight_back, mlps.bias_back),
        (out, mlps.weight_out, mlps.bias_out),
        (hidden_norm, mlps.gain_hidden, mlps.shift_hidden),
        (back_norm, mlps.gain_back, mlps.shift_back),
    ):
        module.to(anchors.dtype)
        module.weight.data.copy_(weight[modality].T.reshape(module.weight.shape))
        module.bias.data.copy_(bias[modality].flatten())
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
    assert not torch.equal(mlps.weight_in, others.weight_in)
    assert not torch.equal(mlps.weight_in[0], mlps.weight_in[1])
    others.reinitialise(1)
    for first, second in zip(mlps.buffers(), others.buffers()):
        assert torch.equal(first, second)
    assert torch.equal(torch.rand(3), expected)
    # As nn.Linear: uniform within ±1/√(inputs).
    assert mlps.weight_in.abs().max() <= DIM**-0.5
    assert mlps.weight_back.abs().max() <= HIDDEN**-0.5
    assert mlps.weight_in.abs().max() > 0.8 * DIM**-0.5
