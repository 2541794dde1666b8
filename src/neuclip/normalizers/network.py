"""What every normalizer-prediction network (NPN) of NeuCLIP (arXiv 2511.08417) has in common.

A network predicts α1_i ≈ log(ε + g1_i) from the image feature e1_i and α2_i from the text feature e2_i. Given its outputs and
the derivative of the inner objective by α, an architecture only has to know its own gradient; the inner loop, the sum over the
ranks and the dtypes are here. Data parallel: every rank holds all weights and its own anchors' gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuclip import distributed
from neuclip.normalizers.adagrad import InnerOptimizer
from neuclip.normalizers.inner_objectives import InnerObjective
from neuclip.normalizers.mixing import add_log_eps, log_or_minus_infinity
from neuclip.pairwise import GlobalBatch

OptimizerMaker = Callable[[tuple[int, ...]], InnerOptimizer]


@dataclass(frozen=True)
class LocalAnchors:
    """This rank's anchors of one batch, in the dtype of a network's weights.

    Attributes:
        features: [2, B, d].
        positive: [B], s_ii.
        logit_scale: 0-dim, 1/τ.
        global_size: N.
    """

    features: Tensor
    positive: Tensor
    logit_scale: Tensor
    global_size: int


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

    @torch.no_grad()
    def fit(self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor, updates: int) -> None:
        """`updates` gradient steps on one batch; features and targets stay fixed.

        Args:
            log_targets: [2, N], T of every anchor of the global batch.
            logit_scale: 0-dim tensor, 1/τ.
        """
        assert self.optimizer is not None, "the weights belong to an outer optimizer"
        weights = self._weights()
        anchors, targets = self._local_anchors(batch, logit_scale), self._local_targets(batch, log_targets)
        for _ in range(updates):
            _, gradient = self._differentiate(weights, anchors, targets)
            self.optimizer.update_(weights, distributed.all_reduce_sum_(gradient))

    @torch.no_grad()
    def predict(self, batch: GlobalBatch, logit_scale: Tensor) -> Tensor:
        """α of every anchor of the global batch, [2, N]."""
        return distributed.all_gather(self.predict_local(batch, logit_scale), dim=1)

    @torch.no_grad()
    def predict_local(self, batch: GlobalBatch, logit_scale: Tensor) -> Tensor:
        """α of this rank's anchors, [2, B]; no message."""
        return self._predict(self._local_anchors(batch, logit_scale)).to(batch.features.dtype)

    @torch.no_grad()
    def differentiate(
        self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Predictions, and the inner objective's gradient over the global batch, from one pass; arguments as for `fit`.

        Returns:
            α of this rank's anchors [2, B]; the network's parameters; a gradient for each, the same on every rank.
        """
        anchors, targets = self._local_anchors(batch, logit_scale), self._local_targets(batch, log_targets)
        log_normalizers, gradient = self._differentiate(self._weights(), anchors, targets)
        gradients = self._by_parameter(distributed.all_reduce_sum_(gradient))
        return log_normalizers.to(batch.features.dtype), tuple(self.parameters()), gradients

    def get_extra_state(self) -> dict[str, int]:
        raise NotImplementedError

    def set_extra_state(self, state: dict[str, int]) -> None:
        if state.keys() != self.get_extra_state().keys():
            raise ValueError("the saved NPN is of another kind: give the --npn_arch that it was trained with")
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def _dtype(self) -> torch.dtype:
        raise NotImplementedError

    def _weights(self) -> Tensor:
        """The weights in use as one stack [2, ...] without gradient, a view that `fit` changes in place."""
        raise NotImplementedError

    def _predict(self, anchors: LocalAnchors) -> Tensor:
        """α [2, B] at the present weights."""
        raise NotImplementedError

    def _differentiate(self, weights: Tensor, anchors: LocalAnchors, targets: Tensor) -> tuple[Tensor, Tensor]:
        """α [2, B] of this rank's anchors at `weights`, and their part of the inner objective's gradient, of its shape."""
        raise NotImplementedError

    def _by_parameter(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """A gradient of the shape of `_weights`, taken apart into one for each of `parameters()`."""
        raise NotImplementedError

    def _by_log_normalizer(self, log_normalizers: Tensor, targets: Tensor, anchors: LocalAnchors) -> Tensor:
        """dF/dα_i, [2, B], with F over the global batch."""
        derivative = self.inner_objective.derivative(log_normalizers, targets, 1.0 / anchors.logit_scale)
        return derivative / anchors.global_size

    def _add_eps(self, log_g: Tensor) -> Tensor:
        return add_log_eps(log_g, self.log_eps)

    def _local_anchors(self, batch: GlobalBatch, logit_scale: Tensor) -> LocalAnchors:
        tensors = (batch.features[:, batch.local], batch.positive[batch.local], logit_scale)
        features, positive, scale = (tensor.to(self._dtype) for tensor in tensors)
        return LocalAnchors(features, positive, scale, batch.size)

    def _local_targets(self, batch: GlobalBatch, log_targets: Tensor) -> Tensor:
        return log_targets[:, batch.local].to(self._dtype)


def register_weights(owner: nn.Module, name: str, weights: Tensor, outer: bool) -> None:
    """Give a module weights: a parameter if an outer optimizer trains them, a buffer if the inner loop does."""
    if outer:
        owner.register_parameter(name, nn.Parameter(weights))
    else:
        owner.register_buffer(name, weights)
