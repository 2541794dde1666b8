"""The two optimizers of the prototypes. Their state is float32 (float64 in tests) buffers, reset at every restart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeOptimizer(nn.Module):
    """Updates a stack of two prototype matrices [2, m, d] in place from gradients tangent to their rows."""

    lr: float

    def reset(self) -> None:
        """Forget the past, as at a restart of the prototypes."""
        raise NotImplementedError

    def update_(self, prototypes: Tensor, gradient: Tensor) -> None:
        """One step. `prototypes` [2, m_active, d] is changed in place; `gradient` has the same shape."""
        raise NotImplementedError


class AdaGradNorm(PrototypeOptimizer):
    """AdaGrad with one accumulator per matrix: W ← unit rows of ( W − lr·G / sqrt(Σ ‖G‖²) ).

    (Ward, Wu, Bottou, "AdaGrad stepsizes", arXiv 1806.01811.) The first step moves the whole matrix by lr in Frobenius norm,
    where the coordinate-wise form moves each of its m·d coordinates by lr. Rows stay on the unit sphere.

    Raises:
        ValueError: weight_decay is not 0: shrinking a row that is set back to unit length does nothing.
    """

    accumulator: Tensor

    def __init__(self, num_prototypes: int, dim: int, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        if weight_decay != 0.0:
            raise ValueError(
                f"--npn_wd {weight_decay} has no effect on the unit-length rows of --npn_optimizer adagrad_norm: "
                "use --npn_wd 0 or --npn_optimizer adagrad"
            )
        self.lr = lr
        self.register_buffer("accumulator", torch.zeros(2))

    def reset(self) -> None:
        self.accumulator.zero_()

    def update_(self, prototypes: Tensor, gradient: Tensor) -> None:
        self.accumulator += gradient.square().sum(dim=(1, 2))
        # A gradient of exactly zero leaves the prototypes where they are instead of dividing 0 by 0.
        scale = self.lr * self.accumulator.clamp_min(torch.finfo(gradient.dtype).tiny).rsqrt()
        prototypes.copy_(F.normalize(prototypes - scale[:, None, None] * gradient, dim=2))


class AdaGrad(PrototypeOptimizer):
    """Coordinate-wise AdaGrad (Duchi, Hazan, Singer 2011) with PyTorch's ε of 1e-10 and L2 weight decay."""

    accumulator: Tensor

    def __init__(self, num_prototypes: int, dim: int, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        self.register_buffer("accumulator", torch.zeros(2, num_prototypes, dim))

    def reset(self) -> None:
        self.accumulator.zero_()

    def update_(self, prototypes: Tensor, gradient: Tensor) -> None:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * prototypes
        accumulator = self.accumulator[:, : prototypes.shape[1]]
        accumulator.addcmul_(gradient, gradient)
        prototypes.addcdiv_(gradient, accumulator.sqrt().add_(1e-10), value=-self.lr)


PROTOTYPE_OPTIMIZERS: dict[str, type[AdaGradNorm] | type[AdaGrad]] = {"adagrad_norm": AdaGradNorm, "adagrad": AdaGrad}
