"""The normalizer-prediction network (NPN) of NeuCLIP (arXiv 2511.08417): one matrix of prototypes per modality.

    α1_i = log( ε + 1/m Σ_j exp((cos(e1_i, W1_j) − s_ii)/τ) )       W1 stands for the texts of the data set
    α2_i = log( ε + 1/m Σ_j exp((cos(e2_i, W2_j) − s_ii)/τ) )       W2 stands for its images

It is trained on the part of the objective (eq. 12) that depends on α,  ½·mean_i τ·[exp(T_i − α_i) + α_i]  with
T_i = log(ε + g_i) the batch's own estimate; the minimum over α_i is E[ε + g_i], the quantity wanted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuclip import distributed
from neuclip.normalizers.adagrad import PrototypeOptimizer
from neuclip.pairwise import LOG_WEIGHT_CEILING, GlobalBatch


class PrototypeNormalizer(nn.Module):
    """Predicts α of a batch's anchors; data parallel: every rank holds all prototypes and its own anchors' gradient.

    Args:
        num_prototypes: m, per modality.
        dim: d, width of the features.
        eps: ε, inside the logarithm.
        optimizer: updates the prototypes.
        batch_size: N, the global batch. When m > N, the features of the last ⌈m/N⌉ batches are remembered for restarts.

    Raises:
        ValueError: num_prototypes is not positive.
    """

    prototypes: Tensor
    recent: Tensor

    def __init__(
        self, num_prototypes: int, dim: int, eps: float, optimizer: PrototypeOptimizer, batch_size: int
    ) -> None:
        super().__init__()
        if num_prototypes < 1:
            raise ValueError(f"--npn_num_protos {num_prototypes}: a normalizer needs at least 1 prototype")
        self.num_prototypes = num_prototypes
        self.log_eps = math.log(eps) if eps > 0 else -math.inf
        self.optimizer = optimizer
        # Rows beyond `active` are not in use yet: before the first m samples were seen there is nothing to fill them with.
        self.register_buffer("prototypes", torch.zeros(2, num_prototypes, dim))
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
            features = batch.features.to(self.recent.dtype)
            self.recent.copy_(torch.cat((features[:, :capacity], self.recent), dim=1)[:, :capacity])
            self.num_recent = min(self.num_recent + batch.size, capacity)

    @torch.no_grad()
    def restart(self, batch: GlobalBatch) -> None:
        """W1 ← text features, W2 ← the image features of the same samples, newest first; the optimizer forgets its past.

        `observe(batch)` comes first. With m > N and fewer than m samples seen so far, all of them become prototypes.
        """
        source = self.recent[:, : self.num_recent] if self.recent.shape[1] else batch.features
        source = source[:, : self.num_prototypes]
        self.active = source.shape[1]
        # A feature of zeros (a tower that broke down) has no direction: any will do, as long as it is finite.
        is_zero = source.norm(dim=2, keepdim=True) == 0
        source = torch.where(is_zero, source.shape[2] ** -0.5, source)
        self.prototypes[:, : self.active].copy_(source.flip(0))
        self.optimizer.reset()

    @torch.no_grad()
    def fit(self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor, updates: int) -> None:
        """`updates` gradient steps on one batch; features and targets stay fixed.

        Args:
            log_targets: [2, N], T of every anchor of the global batch.
            logit_scale: 0-dim tensor, 1/τ.
        """
        prototypes = self.prototypes[:, : self.active]
        anchors, positive, logit_scale = self._local_anchors(batch, logit_scale)
        targets = log_targets[:, batch.local].to(prototypes.dtype)
        for _ in range(updates):
            length = prototypes.norm(dim=2, keepdim=True).clamp_min(1e-12)
            unit = prototypes / length
            shares, log_factor, log_normalizers = self._compare(anchors, unit, positive, logit_scale)
            # dF/dα_i = ½·τ/N·(1 − exp(T_i − α_i));  dα_i/dcos_ij = p_ij/τ;  p_ij = the share of prototype j in exp(α_i)
            excess = 1.0 - (targets - log_normalizers).clamp_max(LOG_WEIGHT_CEILING).exp()
            coefficients = shares.mul_((log_factor.exp() * excess / (2 * batch.size))[:, :, None])
            gradient = torch.bmm(coefficients.transpose(1, 2), anchors)
            distributed.all_reduce_sum_(gradient)
            tangent = (gradient - (gradient * unit).sum(dim=2, keepdim=True) * unit) / length
            self.optimizer.update_(prototypes, tangent)

    @torch.no_grad()
    def predict(self, batch: GlobalBatch, logit_scale: Tensor) -> Tensor:
        """α of every anchor of the global batch, [2, N]."""
        unit = F.normalize(self.prototypes[:, : self.active], dim=2)
        anchors, positive, logit_scale = self._local_anchors(batch, logit_scale)
        local = self._compare(anchors, unit, positive, logit_scale)[2]
        return distributed.all_gather(local.to(batch.features.dtype), dim=1)

    def _local_anchors(self, batch: GlobalBatch, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's anchors [2, B, d], their s_ii [B], and 1/τ, in the prototypes' dtype."""
        tensors = (batch.features[:, batch.local], batch.positive[batch.local], logit_scale)
        anchors, positive, scale = (tensor.to(self.prototypes.dtype) for tensor in tensors)
        return anchors, positive, scale

    def _compare(
        self, anchors: Tensor, unit: Tensor, positive: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare anchors with unit prototypes; one exp per pair, and one [2, B, m_active] block in all.

        Returns:
            shares [2, B, m_active], exp(logit − the row's largest); the log [2, B] of the factor that turns them into each
            prototype's part of exp(α); α [2, B].
        """
        shares = torch.bmm(anchors * logit_scale, unit.transpose(1, 2))
        largest = shares.amax(dim=2)
        shares.sub_(largest[:, :, None]).exp_()
        offset = largest - positive * logit_scale - math.log(self.active)
        log_mean = shares.sum(dim=2).log() + offset
        log_normalizers = torch.logaddexp(log_mean, log_mean.new_full((), self.log_eps))
        return shares, offset - log_normalizers, log_normalizers

    def get_extra_state(self) -> dict[str, int]:
        return {"active": self.active, "num_recent": self.num_recent}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.active = state["active"]
        self.num_recent = min(state["num_recent"], self.recent.shape[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The memory exists only where m > N, and N may change from one start to the next.
        key = prefix + "recent"
        if key in state_dict and state_dict[key].shape[1] != self.recent.shape[1]:
            state_dict[key] = torch.zeros_like(self.recent)
        super()._load_from_state_dict(state_dict, prefix, *args)
