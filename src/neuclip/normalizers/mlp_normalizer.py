"""A normalizer-prediction network without prototypes: two residual MLPs (an ablation of NeuCLIP, arXiv 2511.08417).

    α1_i = log( ε + exp(λ1(e1_i) − s_ii/τ) )        α2_i = log( ε + exp(λ2(e2_i) − s_ii/τ) )

so that λ1(e1_i) stands for log mean_j exp(s_ij/τ), which like the prototypes' part of α depends on e1_i only. Data parallel:
every rank holds all weights and works on its own anchors; one message per update sums the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neuclip import distributed
from neuclip.normalizers.inner_objectives import InnerObjective
from neuclip.normalizers.mixing import add_log_eps
from neuclip.normalizers.mlp import ResidualMLPs
from neuclip.normalizers.network import NormalizerNetwork, OptimizerMaker, register_weights
from neuclip.pairwise import GlobalBatch


class _LocalAnchors(NamedTuple):
    """This rank's anchors of one batch, in the dtype of the weights.

    features: [2, B, d]. own_logits: [B], s_ii/τ. logit_scale: 0-dim, 1/τ. global_size: N.
    """

    features: Tensor
    own_logits: Tensor
    logit_scale: Tensor
    global_size: int


class MLPNormalizer(NormalizerNetwork):
    """Predicts α of a batch's anchors by an MLP per modality; the gradient comes from autograd, as one tensor for all weights.

    Args:
        dim, hidden: d and h of ResidualMLPs.
        eps, inner_objective: see NormalizerNetwork.
        make_optimizer: the optimizer of weights of shape [2, P], P per modality; None where an outer optimizer trains them.
    """

    def __init__(
        self, dim: int, hidden: int, eps: float, inner_objective: InnerObjective, make_optimizer: OptimizerMaker | None
    ) -> None:
        mlp = ResidualMLPs(dim, hidden)
        super().__init__(eps, inner_objective, make_optimizer(tuple(mlp.weights.shape)) if make_optimizer else None)
        if make_optimizer is None:
            weights = mlp.weights
            del mlp.weights
            register_weights(mlp, "weights", weights, outer=True)
        self.mlp = mlp
        self.restarts = 0

    @torch.no_grad()
    def restart(self, batch: GlobalBatch) -> None:
        """Other random weights. Those of the k-th restart depend on k only: all ranks and resumed runs draw the same."""
        self.mlp.reinitialise(self.restarts)
        self.restarts += 1
        if self.optimizer is not None:
            self.optimizer.reset()

    @torch.no_grad()
    def fit(self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor, updates: int) -> None:
        assert self.optimizer is not None, "the weights belong to an outer optimizer"
        anchors, targets = self._local_anchors(batch, logit_scale), self._local_targets(batch, log_targets)
        weights = self.mlp.weights.detach()
        for _ in range(updates):
            _, gradient = self._differentiate(anchors, targets)
            self.optimizer.update_(weights, distributed.all_reduce_sum_(gradient))

    @torch.no_grad()
    def predict(self, batch: GlobalBatch, logit_scale: Tensor) -> Tensor:
        anchors = self._local_anchors(batch, logit_scale)
        return self._gathered(self._log_normalizers(self.mlp(anchors.features), anchors), batch)

    @torch.no_grad()
    def differentiate(
        self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        anchors, targets = self._local_anchors(batch, logit_scale), self._local_targets(batch, log_targets)
        log_normalizers, gradient = self._differentiate(anchors, targets)
        gradients = (distributed.all_reduce_sum_(gradient),)
        return self._gathered(log_normalizers, batch), tuple(self.parameters()), gradients

    def _differentiate(self, anchors: _LocalAnchors, targets: Tensor) -> tuple[Tensor, Tensor]:
        """α [2, B] of this rank's anchors, and their part of the inner objective's gradient, [2, P]."""
        with torch.enable_grad():
            leaf = self.mlp.weights.detach().requires_grad_()
            outputs = self.mlp(anchors.features, leaf)
        fixed = outputs.detach()
        log_normalizers = self._log_normalizers(fixed, anchors)
        # dα_i/dλ_i = the share of exp(λ_i − s_ii/τ) in exp(α_i); the rest is ε's.
        share = (fixed - anchors.own_logits - log_normalizers).exp()
        slope = self._by_log_normalizer(log_normalizers, targets, anchors.logit_scale, anchors.global_size)
        (gradient,) = torch.autograd.grad(outputs, leaf, share * slope)
        return log_normalizers, gradient

    def _log_normalizers(self, outputs: Tensor, anchors: _LocalAnchors) -> Tensor:
        return add_log_eps(outputs - anchors.own_logits, self.log_eps)

    def _local_anchors(self, batch: GlobalBatch, logit_scale: Tensor) -> _LocalAnchors:
        tensors = (batch.features[:, batch.local], batch.positive[batch.local], logit_scale)
        features, positive, scale = (tensor.to(self.mlp.weights.dtype) for tensor in tensors)
        return _LocalAnchors(features, positive * scale, scale, batch.size)

    def _local_targets(self, batch: GlobalBatch, log_targets: Tensor) -> Tensor:
        return log_targets[:, batch.local].to(self.mlp.weights.dtype)

    def _gathered(self, log_normalizers: Tensor, batch: GlobalBatch) -> Tensor:
        """[2, N] on every rank from the ranks' [2, B]."""
        return distributed.all_gather(log_normalizers.to(batch.features.dtype), dim=1)

    def get_extra_state(self) -> dict[str, int]:
        return {"restarts": self.restarts}
