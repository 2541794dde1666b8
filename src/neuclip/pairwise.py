"""The log-domain geometry of a batch, shared by every global contrastive objective.

With e1_i, e2_i the L2-normalised image and text features of sample i, s_ij = e1_i·e2_j and temperature τ = 1/logit_scale,

    h1_ij = (s_ij − s_ii)/τ    image anchor i against text j           g1_i = 1/(N−1) Σ_{j≠i} exp(h1_ij)
    h2_ij = (s_ji − s_ii)/τ    text anchor i against image j           g2_i = 1/(N−1) Σ_{j≠i} exp(h2_ij)

(FastCLIP, arXiv 2407.01445, eq. 1). Only logarithms of g are ever formed: at τ = 0.01 h reaches 200, and exp(200) is not a
float32. A pair's weight is exp(h_ij − α_i) with α_i a logarithm too.

A stack of two along the first dimension is always (image anchors, text anchors).

A temperature may be one for all (`logit_scale` 0-dim) or one per anchor and modality (`logit_scale` [2, N]).

Every rank works on the two blocks e1_local·E2ᵀ and e2_local·E1ᵀ of shape [B, N]. The gradient on a rank's own features has a
part as anchor (needs α of its own B samples) and a part as negative of all N anchors (needs s_kk and α_k of all N: vectors);
both come out of these two blocks, so gradients of features never cross ranks. The blocks are formed a chunk of rows at a
time, and again where they are needed again: what stays for the backward pass has the size of the features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuclip import distributed

# exp() of a log-weight above this is clamped. The weights of a sensible normalizer are far below (they sum to N−1 when α is
# the batch's own estimate); the ceiling only keeps a wildly wrong prediction finite in float32, squares included.
LOG_WEIGHT_CEILING = 40.0

# Unless told otherwise, a chunk of rows of a [B, N] block has at most this many elements (64 MiB of float32).
MAX_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class GlobalBatch:
    """The features of the whole batch as one rank sees them. Nothing in it carries a gradient.

    Attributes:
        features: [2, N, d] float32 (float64 in tests): image features, text features.
        positive: [N] similarities s_kk of the matching pairs.
        start: index of this rank's first sample.
        local_size: B, the number of this rank's samples.
        chunk_rows: rows of a [B, N] block that are formed at a time; None for as many as MAX_BLOCK_ELEMENTS allows.
    """

    features: Tensor
    positive: Tensor
    start: int
    local_size: int
    chunk_rows: int | None = None

    @property
    def size(self) -> int:
        """N, the number of samples of the global batch."""
        return self.features.shape[1]

    @property
    def local(self) -> slice:
        """The positions of this rank's samples in the global batch."""
        return slice(self.start, self.start + self.local_size)

    def positions(self, rows: slice) -> slice:
        """Positions in the global batch of a chunk of this rank's rows."""
        return slice(self.start + rows.start, self.start + rows.stop)

    def row_chunks(self) -> Iterator[slice]:
        """Positions (within this rank's samples) of consecutive chunks of rows."""
        rows = self.chunk_rows or max(1, MAX_BLOCK_ELEMENTS // self.size)
        for first in range(0, self.local_size, rows):
            yield slice(first, min(first + rows, self.local_size))


def gather_batch(image_features: Tensor, text_features: Tensor, chunk_rows: int | None = None) -> GlobalBatch:
    """Gather the features of all ranks (one message).

    Args:
        image_features, text_features: [B, d], L2-normalised.
        chunk_rows: see GlobalBatch.

    Raises:
        ValueError: the global batch has fewer than two samples, so that no sample has a negative.
    """
    images, texts = distributed.all_gather_features(image_features, text_features)
    if images.shape[0] < 2:
        raise ValueError(
            "a contrastive objective needs a global batch of at least 2 samples, got 1: raise --batch-size"
        )
    return GlobalBatch(
        features=torch.stack((images, texts)),
        positive=(images * texts).sum(dim=1),
        start=distributed.rank() * image_features.shape[0],
        local_size=image_features.shape[0],
        chunk_rows=chunk_rows,
    )


def batch_log_means(batch: GlobalBatch, logit_scale: Tensor) -> Tensor:
    """log g1_i and log g2_i over the global batch, for this rank's anchors.

    Args:
        logit_scale: 1/τ, 0-dim, or [2, N] with one for each anchor of the global batch.

    Returns:
        [2, B].
    """
    result = batch.features.new_empty((2, batch.local_size))
    for modality in (0, 1):
        for rows in batch.row_chunks():
            own = batch.positions(rows)
            logits = _similarities(batch, modality, rows).sub_(batch.positive[own, None])
            logits.mul_(_scales(logit_scale, modality, own))
            _mask_positive(logits, batch, rows)
            result[modality, rows] = torch.logsumexp(logits, dim=1)
    return result - math.log(batch.size - 1)


@dataclass(frozen=True)
class WeightedPairs:
    """Sums over the pairs of a batch with weights w_ij = exp(h_ij − α_i), negatives j ≠ i only.

    Attributes:
        features: [2, B, d]. For this rank's sample k of one modality, with f_j the features of the other modality:
            Σ_j w_kj·f_j (k as anchor) + Σ_i w_ik·f_i (k as negative of all N anchors i).
        weights: [2, B], Σ_j w_ij.
        weighted_logits: [2, B], Σ_j w_ij·h_ij.
    """

    features: Tensor
    weights: Tensor
    weighted_logits: Tensor


def weighted_pairs(batch: GlobalBatch, log_normalizers: Tensor, logit_scale: Tensor) -> WeightedPairs:
    """What the gradient of any global objective is made of, at given log-normalizers α.

    Args:
        log_normalizers: [2, N], α of every anchor of the global batch.
        logit_scale: 1/τ, 0-dim, or [2, N] with one for each anchor of the global batch.
    """
    features = batch.features.new_zeros((2, batch.local_size, batch.features.shape[2]))
    weights = batch.features.new_empty((2, batch.local_size))
    weighted_logits = torch.empty_like(weights)
    for modality in (0, 1):
        for rows in batch.row_chunks():
            sums = _sums_over_pairs(batch, modality, rows, log_normalizers, logit_scale)
            features[modality, rows], weights[modality, rows], weighted_logits[modality, rows] = sums
    return WeightedPairs(features, weights, weighted_logits)


def _sums_over_pairs(
    batch: GlobalBatch, modality: int, rows: slice, log_normalizers: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of rows of the three fields of WeightedPairs, with memory for three blocks [rows, N]."""
    own = batch.positions(rows)
    similarity = _similarities(batch, modality, rows)
    logits = (similarity - batch.positive[own, None]).mul_(_scales(logit_scale, modality, own))
    as_anchor = _weights(logits - log_normalizers[modality, own, None], batch, rows)
    weights = as_anchor.sum(dim=1)
    weighted_logits = logits.mul_(as_anchor).sum(dim=1)
    # The same similarities seen from the other side: these samples as negatives of all N anchors.
    other_scale = logit_scale if logit_scale.dim() == 0 else logit_scale[1 - modality]
    as_negative = similarity.sub_(batch.positive).mul_(other_scale).sub_(log_normalizers[1 - modality])
    both = _weights(as_negative, batch, rows).add_(as_anchor)
    return both @ batch.features[1 - modality], weights, weighted_logits


@dataclass(frozen=True)
class PairwiseGradient:
    """What a global objective needs from the B×N blocks at given log-normalizers α. Sums run over the negatives j ≠ i.

    Attributes:
        features: [2, B, d], the gradient that `pairwise_gradient` describes.
        ratio: [2, B], g_i·exp(−α_i): 1 − ε·exp(−α_i) where α_i is the batch's own log(ε + g_i).
        weighted_logits: [2, B], 1/(N−1) Σ_j exp(h_ij − α_i)·h_ij.
    """

    features: Tensor
    ratio: Tensor
    weighted_logits: Tensor


def pairwise_gradient(batch: GlobalBatch, log_normalizers: Tensor, logit_scale: Tensor) -> PairwiseGradient:
    """Closed-form gradient of  ½·mean_i [τ1_i·exp(−α1_i)·g1_i + τ2_i·exp(−α2_i)·g2_i]  with α and τ held constant.

    The mean runs over the N samples of the global batch; the gradient is with respect to this rank's features and multiplied
    by K, because DistributedDataParallel divides by K. dh_ij/ds_ij = 1/τ_i cancels the factor τ_i.

    Args:
        log_normalizers: [2, N], α of every anchor of the global batch.
        logit_scale: 1/τ, 0-dim, or [2, N] with one for each anchor of the global batch.
    """
    pairs = weighted_pairs(batch, log_normalizers, logit_scale)
    # Every h_ij contains −s_ii, whose gradient falls on both features of sample i.
    partners = batch.features[:, batch.local].flip(0)
    gradient = pairs.features - pairs.weights.sum(dim=0)[None, :, None] * partners
    negatives = batch.size - 1
    return PairwiseGradient(
        features=gradient / (2 * batch.local_size * negatives),
        ratio=pairs.weights / negatives,
        weighted_logits=pairs.weighted_logits / negatives,
    )


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to some tensors were worked out beforehand."""

    @staticmethod
    def forward(ctx, value: Tensor, count: int, *tensors: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        inputs, gradients = tensors[:count], tensors[count:]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
        gradients = [(g * grad_output).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes)]
        return (None, None, *gradients, *([None] * len(gradients)))


def with_gradients(value: Tensor, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """A 0-dim tensor equal to `value` whose backward yields `gradients` on `inputs`.

    Closed-form gradients are formed in the forward pass, so that no [B, N] block is kept for backward.

    Raises:
        ValueError: shapes of inputs and gradients differ.
    """
    for tensor, gradient in zip(inputs, gradients, strict=True):
        if tensor.shape != gradient.shape:
            raise ValueError(f"gradient of shape {tuple(gradient.shape)} for an input of shape {tuple(tensor.shape)}")
    return _WithGradients.apply(value.detach(), len(inputs), *inputs, *(g.detach() for g in gradients))


def _similarities(batch: GlobalBatch, modality: int, rows: slice) -> Tensor:
    """[rows, N] similarities of this rank's anchors of one modality with all samples of the other."""
    anchors = batch.features[modality, batch.local][rows]
    return anchors @ batch.features[1 - modality].T


def _scales(logit_scale: Tensor, modality: int, anchors: slice) -> Tensor:
    """1/τ of some anchors, to be multiplied with a [rows, N] block."""
    return logit_scale if logit_scale.dim() == 0 else logit_scale[modality, anchors, None]


def _mask_positive(block: Tensor, batch: GlobalBatch, rows: slice) -> None:
    """Take the matching pair out of each row of a [rows, N] block of logits, in place."""
    block.diagonal(batch.start + rows.start).fill_(-math.inf)


def _weights(log_weights: Tensor, batch: GlobalBatch, rows: slice) -> Tensor:
    """exp of a fresh [rows, N] block of log-weights, 0 on the matching pairs."""
    _mask_positive(log_weights, batch, rows)
    return log_weights.clamp_(max=LOG_WEIGHT_CEILING).exp_()
