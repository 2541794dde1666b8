"""A normalizer-prediction network without prototypes: two residual MLPs (an ablation of NeuCLIP, arXiv 2511.08417).

    α1_i = log( ε + exp(λ1(e1_i) − s_ii/τ) )        α2_i = log( ε + exp(λ2(e2_i) − s_ii/τ) )

so that λ1(e1_i) stands for log mean_j exp(s_ij/τ), which like the prototypes' part of α depends on e1_i only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuclip.normalizers.inner_objectives import InnerObjective
from neuclip.normalizers.mlp import ResidualMLPs
from neuclip.normalizers.network import LocalAnchors, NormalizerNetwork, OptimizerMaker, register_weights
from neuclip.pairwise import GlobalBatch


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

    @property
    def _dtype(self) -> torch.dtype:
        return self.mlp.weights.dtype

    def _weights(self) -> Tensor:
        return self.mlp.weights.detach()

    def _predict(self, anchors: LocalAnchors) -> Tensor:
        return self._log_normalizers(self.mlp(anchors.features), anchors)

    def _differentiate(self, weights: Tensor, anchors: LocalAnchors, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = weights.detach().requires_grad_()
            outputs = self.mlp(anchors.features, leaf)
        fixed = outputs.detach()
        log_normalizers = self._log_normalizers(fixed, anchors)
        # dα_i/dλ_i = the share of exp(λ_i − s_ii/τ) in exp(α_i); the rest is ε's.
        share = (fixed - anchors.positive * anchors.logit_scale - log_normalizers).exp()
        by_output = share * self._by_log_normalizer(log_normalizers, targets, anchors)
        (gradient,) = torch.autograd.grad(outputs, leaf, by_output)
        return log_normalizers, gradient

    def _by_parameter(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return (gradient,)

    def _log_normalizers(self, outputs: Tensor, anchors: LocalAnchors) -> Tensor:
        return self._add_eps(outputs - anchors.positive * anchors.logit_scale)

    def get_extra_state(self) -> dict[str, int]:
        return {"restarts": self.restarts}
