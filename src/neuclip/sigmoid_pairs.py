"""The pairwise sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1) and its gradients, a chunk of rows at a time.

With x_ij = logit_scale·s_ij + logit_bias and z_ij = +1 on matching pairs, −1 elsewhere,

    L = −1/N Σ_ij log sigmoid(z_ij·x_ij)        dL/dx_ij = −z_ij·sigmoid(−z_ij·x_ij)/N

Every pair is an image anchor of exactly one rank and a text anchor of exactly one rank. So the rank's block e1_local·E2ᵀ
yields its share of L, of both scalar gradients, and the gradient on its images; e2_local·E1ᵀ yields that on its texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip.pairwise import GlobalBatch


@dataclass(frozen=True)
class SigmoidPairs:
    """The loss and its closed-form gradients, each such that the mean over the ranks is that of the global batch.

    Attributes:
        loss: 0-dim, this rank's share.
        features: [2, B, d], by this rank's features; multiplied by K, because DistributedDataParallel divides by K.
        logit_scale, logit_bias: 0-dim, by logit_scale and logit_bias.
    """

    loss: Tensor
    features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


def sigmoid_pairs(batch: GlobalBatch, logit_scale: Tensor, logit_bias: Tensor) -> SigmoidPairs:
    """L above over the global batch, with memory for two or three blocks of a chunk of rows by N.

    Args:
        logit_scale, logit_bias: 0-dim, in the dtype of the features.
    """
    losses = batch.features.new_empty(batch.local_size)
    by_bias = torch.empty_like(losses)
    # Σ_j dL/dx_ij·f_j of this rank's samples i of one modality, f_j the features of the other.
    sums = batch.features.new_empty((2, batch.local_size, batch.features.shape[2]))
    for rows in batch.row_chunks():
        block = _signed_logits(batch, 0, rows, logit_scale, logit_bias)
        losses[rows] = -F.logsigmoid(block).sum(dim=1)
        _derivative_(block, batch, rows)
        by_bias[rows] = block.sum(dim=1)
        sums[0, rows] = block @ batch.features[1]
    for rows in batch.row_chunks():
        block = _signed_logits(batch, 1, rows, logit_scale, logit_bias)
        sums[1, rows] = _derivative_(block, batch, rows) @ batch.features[0]
    # N over K is B. And Σ_ij dL/dx_ij·s_ij = Σ_i e1_i·(Σ_j dL/dx_ij·e2_j): the sums are there already.
    sums /= batch.local_size
    return SigmoidPairs(
        loss=losses.mean(),
        features=sums * logit_scale,
        logit_scale=(sums[0] * batch.features[0, batch.local]).sum(),
        logit_bias=by_bias.mean(),
    )


def _signed_logits(batch: GlobalBatch, modality: int, rows: slice, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """z_ij·x_ij of a chunk of this rank's anchors of one modality with all samples of the other, [rows, N]."""
    block = batch.features[modality, batch.positions(rows)] @ batch.features[1 - modality].T
    block.mul_(-logit_scale).sub_(logit_bias)
    _matching_pairs(block, batch, rows).neg_()
    return block


def _derivative_(block: Tensor, batch: GlobalBatch, rows: slice) -> Tensor:
    """−z·sigmoid(−z·x) from z·x, in place. (On matching pairs sigmoid(x) − 1 would be the same but round to 0 early.)"""
    block.neg_().sigmoid_()
    _matching_pairs(block, batch, rows).neg_()
    return block


def _matching_pairs(block: Tensor, batch: GlobalBatch, rows: slice) -> Tensor:
    """The view [rows] of a [rows, N] block at the pairs (i, i)."""
    return block.diagonal(batch.start + rows.start)
