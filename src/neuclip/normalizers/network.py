"""What every normalizer-prediction network (NPN) of NeuCLIP (arXiv 2511.08417) has in common.

A network predicts α1_i ≈ log(ε + g1_i) from the image feature e1_i and α2_i from the text feature e2_i. How the work is spread
over the ranks is the architecture's own affair; what it hands out is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from neuclip.normalizers.adagrad import InnerOptimizer
from neuclip.normalizers.inner_objectives import InnerObjective
from neuclip.normalizers.mixing import log_or_minus_infinity
from neuclip.pairwise import GlobalBatch

OptimizerMaker = Callable[[tuple[int, ...]], InnerOptimizer]


class NormalizerNetwork(nn.Module):
    """Predicts α of a batch's anchors and learns to, on one batch at a time.

    Args:
        eps: ε, inside the logarithm.
        inner_objective: what the network is trained on.
        optimizer: changes the weights in `fit`; None where they are nn.Parameters for an outer optimizer.
    """

    def __init__(self, eps: float, inner_objective: InnerObjective, optimizer: InnerOptimizer | None) -> None:
        super().__init__()
        self.log_eps = log_or_minus_infinity(eps)
        self.inner_objective = inner_objective
        self.optimizer = optimizer

    @property
    def filling(self) -> bool:
        """Whether the next batch should restart the network because the last one could not do so completely."""
        return False

    def observe(self, batch: GlobalBatch) -> None:
        """Take note of a batch's features, for restarts; before `restart`, once a step."""

    def restart(self, batch: GlobalBatch) -> None:
        """Begin anew, in place; the inner optimizer forgets its past. (An outer optimizer keeps its moments.)"""
        raise NotImplementedError

    def fit(self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor, updates: int) -> None:
        """`updates` gradient steps on one batch; features and targets stay fixed.

        Args:
            log_targets: [2, N], T of every anchor of the global batch.
            logit_scale: 0-dim tensor, 1/τ.
        """
        raise NotImplementedError

    def predict(self, batch: GlobalBatch, logit_scale: Tensor) -> Tensor:
        """α of every anchor of the global batch, [2, N], on every rank."""
        raise NotImplementedError

    def differentiate(
        self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Predictions, and the inner objective's gradient over the global batch, from one pass; arguments as for `fit`.

        Returns:
            α of every anchor [2, N]; the network's parameters; a gradient for each. All the same on every rank.
        """
        raise NotImplementedError

    def get_extra_state(self) -> dict[str, int]:
        raise NotImplementedError

    def set_extra_state(self, state: dict[str, int]) -> None:
        if state.keys() != self.get_extra_state().keys():
            raise ValueError("the saved NPN is of another kind: give the --npn_arch that it was trained with")
        for name, value in state.items():
            setattr(self, name, value)

    def _by_log_normalizer(
        self, log_normalizers: Tensor, targets: Tensor, logit_scale: Tensor, global_size: int
    ) -> Tensor:
        """dF/dα_i of some anchors, [2, A], with F over the global batch of N anchors."""
        return self.inner_objective.derivative(log_normalizers, targets, 1.0 / logit_scale) / global_size


def register_weights(owner: nn.Module, name: str, weights: Tensor, outer: bool) -> None:
    """Give a module weights: a parameter if an outer optimizer trains them, a buffer if the inner loop does."""
    if outer:
        owner.register_parameter(name, nn.Parameter(weights))
    else:
        owner.register_buffer(name, weights)
