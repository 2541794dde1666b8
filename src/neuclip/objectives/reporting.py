"""Metrics that mean the same for every objective, so that their curves can be laid over each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip.pairwise import GlobalBatch, batch_log_means, gather_batch


def common_metrics(
    batch: GlobalBatch,
    log_means: Tensor,
    log_estimate: Tensor,
    log_normalizers: Tensor,
    logit_scale: Tensor,
    rho: float,
) -> dict[str, Tensor]:
    """Losses and normalizer statistics over this rank's anchors.

    Args:
        log_means: [2, B], log g over the batch.
        log_estimate: [2, B], log(ε + g) over the batch.
        log_normalizers: [2, B], the method's α.
        logit_scale: 1/τ, 0-dim, or [2, B] with one for each of this rank's anchors.
        rho: ρ of the robust global loss.

    Returns:
        contrastive_loss: mean of the two mini-batch cross-entropies, log(1 + (N−1)·g) in terms of g.
        global_loss: ½·mean τ·(α1 + α2) + τρ, the robust global loss (FastCLIP, eq. 1) at α.
        temperature (mean τ); log_normalizer (mean α); log_normalizer_gap, log_normalizer_gap_max: |α − batch estimate|.
    """
    temperature = 1.0 / logit_scale.detach()
    gap = (log_normalizers - log_estimate).abs()
    return {
        "contrastive_loss": F.softplus(log_means + math.log(batch.size - 1)).mean(),
        "global_loss": (temperature * (log_normalizers + rho)).mean(),
        "temperature": temperature.mean(),
        "log_normalizer": log_normalizers.mean(),
        "log_normalizer_gap": gap.mean(),
        "log_normalizer_gap_max": gap.max(),
    }


@torch.no_grad()
def mini_batch_metrics(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, rho: float, chunk_rows: int | None = None
) -> dict[str, Tensor]:
    """`common_metrics` of an objective without normalizers of its own: α is the batch's log g.

    Args:
        image_features, text_features: [B, d], this rank's, L2-normalised; gathered here.
    """
    batch = gather_batch(image_features, text_features, chunk_rows)
    log_means = batch_log_means(batch, logit_scale)
    return common_metrics(batch, log_means, log_means, log_means, logit_scale, rho)
