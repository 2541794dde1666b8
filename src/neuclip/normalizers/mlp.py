"""Two residual MLPs, one per modality, that map a feature to one number: the networks of AmorLIP.

e → Linear d→h → ReLU → LayerNorm → Linear h→d → ReLU → LayerNorm → + e → ReLU → Linear d→1
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualMLPs(nn.Module):
    """The networks of both modalities side by side, all weights of each in one row.

    One tensor makes what is done to all weights alike one operation: a gradient to sum over the ranks, a moving average, a
    step of an optimizer, a copy. It is a buffer and not a parameter, because the outer optimizer takes every parameter.

    Args:
        dim: d, width of the features.
        hidden: h, width of the hidden layer.
        seed: of the initial weights.

    Attributes:
        weights: [2, P] float32 (float64 in tests); `named_parts` tells what is where.

    Raises:
        ValueError: hidden is not positive.
    """

    weights: Tensor

    def __init__(self, dim: int, hidden: int, seed: int = 0) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"a hidden layer of width {hidden}: give 1 or more")
        self.shapes: dict[str, tuple[int, ...]] = {
            "linear_1.weight": (hidden, dim),
            "linear_1.bias": (hidden,),
            "norm_1.weight": (hidden,),
            "norm_1.bias": (hidden,),
            "linear_2.weight": (dim, hidden),
            "linear_2.bias": (dim,),
            "norm_2.weight": (dim,),
            "norm_2.bias": (dim,),
            "linear_3.weight": (dim,),
            "linear_3.bias": (),
        }
        self.inputs = {"linear_1": dim, "linear_2": hidden, "linear_3": dim}
        self.register_buffer("weights", torch.zeros(2, sum(math.prod(shape) for shape in self.shapes.values())))
        self.reinitialise(seed)

    @torch.no_grad()
    def reinitialise(self, seed: int) -> None:
        """Fresh weights, the same on every rank and device, from a generator of their own: U(−1/√fan_in, 1/√fan_in) in the
        linear layers, as torch.nn.Linear does it; 1 and 0 in the layer norms.
        """
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.empty(self.weights.shape)
        for name, part in self.named_parts(fresh).items():
            layer, kind = name.split(".")
            if layer in self.inputs:
                part.uniform_(-1.0, 1.0, generator=generator).mul_(self.inputs[layer] ** -0.5)
            else:
                part.fill_(1.0 if kind == "weight" else 0.0)
        self.weights.copy_(fresh)

    def named_parts(self, stack: Tensor) -> dict[str, Tensor]:
        """Views of a stack [2, P] laid out as the weights; the first dimension of each is (image, text)."""
        parts = stack.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: part.view(2, *shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def forward(self, anchors: Tensor, weights: Tensor | None = None) -> Tensor:
        """Outputs [2, N] for anchors [2, N, d] (image features, text features), of the weights' dtype.

        Args:
            weights: [2, P] to be used in place of the own ones, such as a copy that requires grad.
        """
        part = self.named_parts(self.weights if weights is None else weights)
        hidden = F.relu(_linear(anchors, part["linear_1.weight"], part["linear_1.bias"]))
        hidden = _layer_norm(hidden, part["norm_1.weight"], part["norm_1.bias"])
        hidden = F.relu(_linear(hidden, part["linear_2.weight"], part["linear_2.bias"]))
        hidden = _layer_norm(hidden, part["norm_2.weight"], part["norm_2.bias"])
        hidden = F.relu(hidden + anchors)
        return _linear(hidden, part["linear_3.weight"][:, None], part["linear_3.bias"][:, None])[:, :, 0]


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[2, N, in] → [2, N, out] with a weight [2, out, in] and a bias [2, out] per modality."""
    return torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2))


def _layer_norm(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the last dimension of [2, N, width], with a gain and an offset [2, width] per modality."""
    return torch.addcmul(bias[:, None], F.layer_norm(inputs, inputs.shape[-1:]), weight[:, None])
