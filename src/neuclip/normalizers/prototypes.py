"""The normalizer-prediction network of NeuCLIP (arXiv 2511.08417): one matrix of prototypes per modality.

α1_i = log( ε + 1/m Σ_j exp((cos(e1_i, W1_j) − s_ii)/τ) )       W1 stands for the texts of the data set
α2_i = log( ε + 1/m Σ_j exp((cos(e2_i, W2_j) − s_ii)/τ) )       W2 stands for its images
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip.normalizers.inner_objectives import InnerObjective
from neuclip.normalizers.network import LocalAnchors, NormalizerNetwork, OptimizerMaker, register_weights
from neuclip.pairwise import GlobalBatch


class PrototypeNormalizer(NormalizerNetwork):
    """Predicts α of a batch's anchors by comparing them with prototypes; the gradient is in closed form.

    Args:
        num_prototypes: m, per modality.
        dim: d, width of the features.
        eps, inner_objective: see NormalizerNetwork.
        make_optimizer: the optimizer of weights of shape [2, m, d]; None where an outer optimizer trains them.
        batch_size: N, the global batch. When m > N, the features of the last ⌈m/N⌉ batches are remembered for restarts.

    Raises:
        ValueError: num_prototypes is not positive.
    """

    prototypes: Tensor
    recent: Tensor

    def __init__(
        self,
        num_prototypes: int,
        dim: int,
        eps: float,
        inner_objective: InnerObjective,
        make_optimizer: OptimizerMaker | None,
        batch_size: int,
    ) -> None:
        if num_prototypes < 1:
            raise ValueError(f"--npn_num_protos {num_prototypes}: a normalizer needs at least 1 prototype")
        shape = (2, num_prototypes, dim)
        super().__init__(eps, inner_objective, make_optimizer(shape) if make_optimizer else None)
        self.num_prototypes = num_prototypes
        # Rows beyond `active` are not in use yet: before the first m samples were seen there is nothing to fill them with.
        register_weights(self, "prototypes", torch.zeros(shape), outer=make_optimizer is None)
        self.active = 0
        # [image features, text features] of the last m samples, newest batch first; empty when every batch alone has m.
        self.register_buffer("recent", torch.zeros(2, num_prototypes if num_prototypes > batch_size else 0, dim))
        self.num_recent = 0

    @property
    def filling(self) -> bool:
        """Whether fewer than m prototypes could be filled at the last restart."""
        return self.active < self.num_prototypes

    @torch.no_grad()
    def observe(self, batch: GlobalBatch) -> None:
        """Remember the features of a batch for the next restart (only where m > N)."""
        capacity = self.recent.shape[1]
        if capacity:
            features = _with_direction(batch.features.to(self.recent.dtype))
            self.recent.copy_(torch.cat((features[:, :capacity], self.recent), dim=1)[:, :capacity])
            self.num_recent = min(self.num_recent + batch.size, capacity)

    @torch.no_grad()
    def restart(self, batch: GlobalBatch) -> None:
        """W1 ← text features, W2 ← the image features of the same samples, newest first; the optimizer forgets its past.

        `observe(batch)` comes first. With m > N and fewer than m samples seen so far, all of them become prototypes.
        """
        source = self.recent[:, : self.num_recent] if self.recent.shape[1] else _with_direction(batch.features)
        source = source[:, : self.num_prototypes]
        self.active = source.shape[1]
        self.prototypes[:, : self.active].copy_(source.flip(0))
        if self.optimizer is not None:
            self.optimizer.reset()

    @property
    def _dtype(self) -> torch.dtype:
        return self.prototypes.dtype

    def _weights(self) -> Tensor:
        return self.prototypes.detach()[:, : self.active]

    def _predict(self, anchors: LocalAnchors) -> Tensor:
        return self._compare(anchors, F.normalize(self._weights(), dim=2))[2]

    def _differentiate(self, weights: Tensor, anchors: LocalAnchors, targets: Tensor) -> tuple[Tensor, Tensor]:
        length = weights.norm(dim=2, keepdim=True).clamp_min(1e-12)
        unit = weights / length
        shares, log_factor, log_normalizers = self._compare(anchors, unit)
        # dα_i/dcos_ij = p_ij/τ with p_ij = the share of prototype j in exp(α_i)
        by_log_mean = log_factor.exp() * self._by_log_normalizer(log_normalizers, targets, anchors)
        by_cosine = shares.mul_((by_log_mean * anchors.logit_scale)[:, :, None])
        gradient = torch.bmm(by_cosine.transpose(1, 2), anchors.features)
        # A cosine does not change with a prototype's length: only what is tangent to the sphere counts.
        return log_normalizers, (gradient - (gradient * unit).sum(dim=2, keepdim=True) * unit) / length

    def _by_parameter(self, gradient: Tensor) -> tuple[Tensor, ...]:
        full = torch.zeros_like(self.prototypes)
        full[:, : self.active] = gradient
        return (full,)

    def _compare(self, anchors: LocalAnchors, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare anchors with unit prototypes; one exp per pair, and one [2, B, m_active] block in all.

        Returns:
            shares [2, B, m_active], exp(logit − the row's largest); the log [2, B] of the factor that turns them into each
            prototype's part of exp(α); α [2, B].
        """
        shares = torch.bmm(anchors.features * anchors.logit_scale, unit.transpose(1, 2))
        largest = shares.amax(dim=2)
        shares.sub_(largest[:, :, None]).exp_()
        offset = largest - anchors.positive * anchors.logit_scale - math.log(self.active)
        log_normalizers = self._add_eps(shares.sum(dim=2).log() + offset)
        return shares, offset - log_normalizers, log_normalizers

    def get_extra_state(self) -> dict[str, int]:
        return {"active": self.active, "num_recent": self.num_recent}

    def set_extra_state(self, state: dict[str, int]) -> None:
        super().set_extra_state(state)
        self.num_recent = min(self.num_recent, self.recent.shape[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The memory exists only where m > N, and N may change from one start to the next.
        key = prefix + "recent"
        if key in state_dict and state_dict[key].shape[1] != self.recent.shape[1]:
            state_dict[key] = torch.zeros_like(self.recent)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _with_direction(features: Tensor) -> Tensor:
    """Features [2, N, d]; those of zeros or of no numbers (a tower that broke down) get some direction, whichever."""
    length = features.norm(dim=2, keepdim=True)
    return torch.where((length > 0) & torch.isfinite(length), features, features.shape[2] ** -0.5)
