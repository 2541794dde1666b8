"""The two optimizers of a normalizer-prediction network's inner loop.

Their state is float32 (float64 in tests) buffers, reset at every restart of the network. They work on the weights of both
modalities as one stack of shape [2, ...]: prototypes [2, m, d], or all weights of two networks as rows [2, P].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuclip import distributed


class InnerOptimizer(nn.Module):
    """Changes a stack of weights in place.

    Args:
        shape: of the stack, [2, ...].
        lr: step size, see the subclasses.
        weight_decay: times the weights is added to the gradient (L2).
    """

    accumulator: Tensor

    def __init__(self, shape: tuple[int, ...], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        self.register_buffer("accumulator", torch.zeros(self._accumulator_shape(shape)))

    def _accumulator_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget the past, as at a restart of the weights."""
        self.accumulator.zero_()

    def update_(self, weights: Tensor, gradient: Tensor) -> None:
        """One step.

        Args:
            weights: the stack, or its leading part along the second dimension; changed in place.
            gradient: of the same shape.
        """
        raise NotImplementedError

    def _decayed(self, weights: Tensor, gradient: Tensor) -> Tensor:
        # A broken batch (an overflow in half precision, say) must not leave the network broken: it has no part in the step.
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        return gradient + self.weight_decay * weights if self.weight_decay else gradient


class AdaGradNorm(InnerOptimizer):
    """AdaGrad with one accumulator per modality: W ← W − lr·G / sqrt(Σ ‖G‖²).

    (Ward, Wu, Bottou, "AdaGrad stepsizes", arXiv 1806.01811.) The first step moves all weights of a modality together by lr in
    Euclidean norm, where the coordinate-wise form moves each one of them by lr.
    """

    def _accumulator_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:1]

    def update_(self, weights: Tensor, gradient: Tensor) -> None:
        gradient = self._decayed(weights, gradient)
        self.accumulator += self._squared_norms(gradient)
        # A gradient of exactly zero leaves the weights where they are instead of dividing 0 by 0.
        scale = self.accumulator.clamp_min(torch.finfo(gradient.dtype).tiny).rsqrt_()
        weights.addcmul_(gradient, scale.view(-1, *[1] * (weights.dim() - 1)), value=-self.lr)

    def _squared_norms(self, gradient: Tensor) -> Tensor:
        """[2], ‖G‖² of each modality."""
        return gradient.flatten(1).norm(dim=1).square_()


class UnitRowsAdaGradNorm(AdaGradNorm):
    """AdaGradNorm on prototypes whose rows are set back to unit length after each step.

    The rows are spread over the ranks, each has its own [2, m/K, d]: ‖G‖² is summed over them by a message of two numbers.

    Raises:
        ValueError: weight_decay is not 0: shrinking a row that is set back to unit length does nothing.
    """

    def __init__(self, shape: tuple[int, ...], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(shape, lr, weight_decay)
        if weight_decay != 0.0:
            raise ValueError(
                f"--npn_wd {weight_decay} has no effect on the unit-length rows of --npn_optimizer adagrad_norm: "
                "use --npn_wd 0 or --npn_optimizer adagrad"
            )

    def update_(self, weights: Tensor, gradient: Tensor) -> None:
        super().update_(weights, gradient)
        weights.div_(weights.norm(dim=2, keepdim=True).clamp_min_(1e-12))

    def _squared_norms(self, gradient: Tensor) -> Tensor:
        return distributed.all_reduce_sum_(super()._squared_norms(gradient))


class AdaGrad(InnerOptimizer):
    """Coordinate-wise AdaGrad (Duchi, Hazan, Singer 2011) with PyTorch's ε of 1e-10 and L2 weight decay.

    What is done to a coordinate depends on it alone, so weights may be replicated or spread over the ranks.
    """

    def _accumulator_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def update_(self, weights: Tensor, gradient: Tensor) -> None:
        gradient = self._decayed(weights, gradient)
        accumulator = self.accumulator[:, : weights.shape[1]]
        accumulator.addcmul_(gradient, gradient)
        weights.addcdiv_(gradient, accumulator.sqrt().add_(1e-10), value=-self.lr)
