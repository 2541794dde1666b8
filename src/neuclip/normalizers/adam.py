"""Adam for one tensor of weights, with a state made of buffers, so that it is saved and moved with its owner."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# A gradient's coordinate beyond this is clamped, so that its square is still a float32. Adam hardly sees the size of a
# gradient, but one infinite square would stop a weight for good.
LARGEST_GRADIENT = 1e18


class Adam(nn.Module):
    """Adam (Kingma and Ba, arXiv 1412.6980) with bias correction and without weight decay.

    Args:
        shape: of the weights.
        lr: step size.
        betas, eps: decay of the two moments, and what is added to the root of the second.

    Attributes:
        first_moment, second_moment: [*shape] float32 (float64 in tests).
        updates: steps since the last `reset`.
    """

    first_moment: Tensor
    second_moment: Tensor

    def __init__(
        self, shape: tuple[int, ...], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__()
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.updates = 0
        self.register_buffer("first_moment", torch.zeros(shape))
        self.register_buffer("second_moment", torch.zeros(shape))

    def reset(self) -> None:
        """Forget the past."""
        self.updates = 0
        self.first_moment.zero_()
        self.second_moment.zero_()

    @torch.no_grad()
    def update_(self, weights: Tensor, gradient: Tensor) -> None:
        """One step. `weights` [*shape] is changed in place; `gradient` has the same shape and is clamped in place."""
        self.updates += 1
        first, second = self.betas
        # A broken batch (an overflow in half precision, say) must not leave the network broken: it has no part in the step.
        gradient = gradient.nan_to_num_(0.0, LARGEST_GRADIENT, -LARGEST_GRADIENT)
        gradient.clamp_(-LARGEST_GRADIENT, LARGEST_GRADIENT)
        self.first_moment.lerp_(gradient, 1.0 - first)
        self.second_moment.mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
        # Bias correction: the moments start at 0.
        root = self.second_moment.sqrt().div_(math.sqrt(1.0 - second**self.updates)).add_(self.eps)
        weights.addcdiv_(self.first_moment, root, value=-self.lr / (1.0 - first**self.updates))

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]
