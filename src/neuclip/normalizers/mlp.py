"""Two small residual MLPs, one per modality, that map a feature to a number (the λ1 and λ2 of AmorLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualMLPs(nn.Module):
    """λ1 for image features, λ2 for text features:

        y = LayerNorm(ReLU(Linear d→h (x)));  z = LayerNorm(ReLU(Linear h→d (y)));  λ(x) = Linear d→1 (ReLU(z + x))

    The weights are buffers, stacked [2, ...] per modality: whoever holds the networks decides how they learn. For gradients,
    give other tensors to torch.func.functional_call.

    Args:
        dim: d, width of the features.
        hidden: h.
    """

    weight_in: Tensor
    bias_in: Tensor
    gain_hidden: Tensor
    shift_hidden: Tensor
    weight_back: Tensor
    bias_back: Tensor
    gain_back: Tensor
    shift_back: Tensor
    weight_out: Tensor
    bias_out: Tensor

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("weight_in", torch.zeros(2, dim, hidden))
        self.register_buffer("bias_in", torch.zeros(2, 1, hidden))
        self.register_buffer("gain_hidden", torch.zeros(2, 1, hidden))
        self.register_buffer("shift_hidden", torch.zeros(2, 1, hidden))
        self.register_buffer("weight_back", torch.zeros(2, hidden, dim))
        self.register_buffer("bias_back", torch.zeros(2, 1, dim))
        self.register_buffer("gain_back", torch.zeros(2, 1, dim))
        self.register_buffer("shift_back", torch.zeros(2, 1, dim))
        self.register_buffer("weight_out", torch.zeros(2, dim, 1))
        self.register_buffer("bias_out", torch.zeros(2, 1, 1))
        self.reinitialise(0)

    @torch.no_grad()
    def reinitialise(self, seed: int) -> None:
        """New random weights, drawn as nn.Linear and nn.LayerNorm do, the same on every device and rank for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for weight, bias in (
            (self.weight_in, self.bias_in),
            (self.weight_back, self.bias_back),
            (self.weight_out, self.bias_out),
        ):
            bound = weight.shape[1] ** -0.5
            for tensor in (weight, bias):
                tensor.copy_(bound * (2.0 * torch.rand(tensor.shape, generator=generator) - 1.0))
        for gain, shift in ((self.gain_hidden, self.shift_hidden), (self.gain_back, self.shift_back)):
            gain.fill_(1.0)
            shift.zero_()

    def forward(self, anchors: Tensor) -> Tensor:
        """λ1 of the image features and λ2 of the text features: [2, N, d] → [2, N]."""
        hidden = torch.baddbmm(self.bias_in, anchors, self.weight_in).relu()
        hidden = _layer_norm(hidden, self.gain_hidden, self.shift_hidden)
        back = torch.baddbmm(self.bias_back, hidden, self.weight_back).relu()
        back = _layer_norm(back, self.gain_back, self.shift_back)
        return torch.baddbmm(self.bias_out, (back + anchors).relu(), self.weight_out)[:, :, 0]


def _layer_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm over the last dimension with a gain and a shift per modality, [2, 1, width]."""
    return F.layer_norm(x, x.shape[-1:]) * gain + shift
