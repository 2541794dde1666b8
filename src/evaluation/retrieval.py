"""Image–text retrieval: recall at k and ranks, in both directions, exact and without an N×N matrix.

Ties are counted as what random tie breaking gives on average. A model that maps everything to one point therefore scores
chance, not 100 %.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evaluation.collectives import all_reduce_sum, exact_float32
from evaluation.errors import UserError

RECALL_AT = (1, 5, 10)

# Two float32 dot products of unit vectors closer than this are the same number up to the order of summation.
TIE_TOLERANCE = 1e-6

# Candidates are scored this many anchor blocks at a time.
_CANDIDATE_BLOCKS = 8


def chance_recall(n: int, k: int, relevant: int = 1) -> float:
    """Recall at k of a random order: the probability that one of `relevant` right items is among the first k of n.

    For one right item this is k/n.

    Args:
        n: number of candidates, at least 1.
        k: length of the list looked at.
        relevant: number of right candidates, 1 … n.

    Raises:
        ValueError: if n < 1, k < 0 or relevant is not in 1 … n.
    """
    if n < 1 or k < 0 or not 1 <= relevant <= n:
        raise ValueError(f"chance_recall(n={n}, k={k}, relevant={relevant}) needs n >= 1, k >= 0, 1 <= relevant <= n.")
    return 1.0 - math.comb(n - relevant, min(k, n)) / math.comb(n, min(k, n))


def chance_metrics(n: int, caption_ids: Tensor | None = None) -> dict[str, float | None]:
    """What a random order scores in every metric of `retrieval_metrics`.

    Args:
        n: number of pairs.
        caption_ids: [n] int64 as in `retrieval_metrics`; None for one right answer per anchor.

    Returns:
        The same names as `retrieval_metrics`; None where chance has no closed form (the median with several right answers).
    """
    if caption_ids is None:
        sizes, weights = [1], [1.0]
    else:
        group_sizes = torch.unique(caption_ids, return_counts=True)[1]
        kinds, number = torch.unique(group_sizes, return_counts=True)
        sizes = kinds.tolist()
        weights = [size * count / n for size, count in zip(sizes, number.tolist())]
    one = sizes == [1]
    values: dict[str, float | None] = {
        "mean_rank": sum(weight * (n + 1) / (size + 1) for size, weight in zip(sizes, weights)),
        "median_rank": (n + 1) / 2 if one else None,
    }
    for k in RECALL_AT:
        values[f"R@{k}"] = sum(weight * chance_recall(n, k, size) for size, weight in zip(sizes, weights))
    return {f"{way}_{name}": value for way in ("image_to_text", "text_to_image") for name, value in values.items()}


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    *,
    rank: int = 0,
    world_size: int = 1,
    block: int = 1024,
    caption_ids: Tensor | None = None,
) -> dict[str, float]:
    """Retrieval metrics of N pairs, one caption per image.

    Every rank passes all N pairs; blocks of anchors are shared over the ranks and their integer counts summed, so the
    numbers are the same on any number of ranks.

    Args:
        image_features: [N, d] float32, L2-normalised, the same on every rank.
        text_features: [N, d] float32, L2-normalised; row i belongs to image i.
        rank, world_size: this process among the ranks of the default process group (gloo or nccl).
        block: anchors scored at a time; memory is O(block² + N).
        caption_ids: [N] int64, equal for equal captions. With them any item of the anchor's caption counts as right, and
            the rank is that of the best right item. Without them only the anchor's own partner does.

    Returns:
        `image_to_text_` and `text_to_image_` followed by `mean_rank`, `median_rank` (1-based; the mean of the two middle
        ranks for even N), `R@1`, `R@5`, `R@10` (shares in 0 … 1). The same on every rank.

    Raises:
        ValueError: for shapes that do not fit, or an empty set.
        UserError: for features that are not finite.
    """
    number = len(image_features)
    ids = torch.arange(number) if caption_ids is None else caption_ids
    if ids.shape != (number,):
        raise ValueError(f"caption_ids has shape {tuple(ids.shape)}; it needs one id for each of the {number} pairs.")
    return grouped_retrieval_metrics(
        image_features, text_features, ids, ids, rank=rank, world_size=world_size, block=block
    )


def grouped_retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    rank: int = 0,
    world_size: int = 1,
    block: int = 1024,
) -> dict[str, float]:
    """Retrieval metrics where an image and a text belong together when their ids are equal.

    For several captions per image: `image_ids = arange(N)` and `text_ids[j]` = the image of caption j. Then image_to_text
    R@k is the share of images with one of their captions among the top k, text_to_image R@k the share of captions whose
    image is among the top k.

    Args:
        image_features: [N, d] float32, L2-normalised, the same on every rank.
        text_features: [M, d] float32, L2-normalised.
        image_ids, text_ids: [N] and [M] int64; each id must occur on both sides.
        rank, world_size, block: as in `retrieval_metrics`.

    Returns:
        As `retrieval_metrics`.

    Raises:
        ValueError: as `retrieval_metrics`, and for an id without a partner on the other side.
    """
    _check_features(image_features, text_features)
    device = image_features.device
    image_features, text_features = image_features.float(), text_features.to(device).float()
    image_ids, text_ids = image_ids.to(device), text_ids.to(device)
    if not torch.equal(torch.unique(image_ids), torch.unique(text_ids)):
        raise ValueError("retrieval: some image has no text of its id or some text no image; drop them before scoring.")
    metrics: dict[str, float] = {}
    for way, anchors, anchor_ids, candidates, candidate_ids in (
        ("image_to_text", image_features, image_ids, text_features, text_ids),
        ("text_to_image", text_features, text_ids, image_features, image_ids),
    ):
        with torch.no_grad(), exact_float32(device):
            counts = _count_scores(anchors, anchor_ids, candidates, candidate_ids, rank, world_size, block)
        counts = all_reduce_sum(counts, world_size).cpu()
        metrics.update({f"{way}_{name}": value for name, value in _metrics_from_counts(counts).items()})
    return metrics


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if features.ndim != 2 or not len(features):
            raise ValueError(f"{name} has shape {tuple(features.shape)}; retrieval needs at least one row of features.")
        # Every comparison with NaN is false: unchecked, a diverged model would have rank 0 everywhere.
        if not bool(torch.isfinite(features).all()):
            raise UserError(
                f"{name} holds values that are not finite: the model has diverged, evaluate an earlier one."
            )
    if image_features.shape[1] != text_features.shape[1]:
        shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        raise ValueError(f"image and text features have shapes {shapes}; their widths must agree.")


def _count_scores(
    anchors: Tensor,
    anchor_ids: Tensor,
    candidates: Tensor,
    candidate_ids: Tensor,
    rank: int,
    world_size: int,
    block: int,
) -> Tensor:
    """For each anchor, the candidates around its best right score.

    The grid of blocks does not depend on the number of ranks: block b belongs to rank b % world_size.

    Returns:
        [3, N] int64: wrong candidates scored higher, wrong ones tied with it, right ones tied with it (itself included);
        zero for the anchors of other ranks.
    """
    counts = torch.zeros(3, len(anchors), dtype=torch.int64, device=anchors.device)
    starts = range(0, len(candidates), block * _CANDIDATE_BLOCKS)
    tiles = [slice(start, start + block * _CANDIDATE_BLOCKS) for start in starts]
    for start in range(rank * block, len(anchors), world_size * block):
        rows = slice(start, start + block)
        best = torch.full_like(anchors[rows, 0], -torch.inf)
        for tile in tiles:
            right = anchor_ids[rows, None] == candidate_ids[None, tile]
            if bool(right.any()):  # with one right answer per anchor only the tile on the diagonal is scored here
                scores = anchors[rows] @ candidates[tile].T
                best = torch.maximum(best, scores.masked_fill(~right, -torch.inf).amax(1))
        for tile in tiles:
            right = anchor_ids[rows, None] == candidate_ids[None, tile]
            difference = anchors[rows] @ candidates[tile].T - best[:, None]
            tied = difference.abs() <= TIE_TOLERANCE
            counts[0, rows] += ((difference > TIE_TOLERANCE) & ~right).sum(1)
            counts[1, rows] += (tied & ~right).sum(1)
            counts[2, rows] += (tied & right).sum(1)
    return counts


def _metrics_from_counts(counts: Tensor) -> dict[str, float]:
    """Mean and median rank and recalls, expected under random tie breaking, from the counts of all anchors [3, N]."""
    higher, wrong, right = counts.to(torch.float64)
    # In a random order of r right and w wrong items the first right one stands at place (w + r + 1) / (r + 1) on average.
    ranks = higher + (wrong + right + 1) / (right + 1)
    ordered = ranks.sort().values
    median = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
    metrics = {"mean_rank": float(ranks.mean()), "median_rank": float(median)}
    for k in RECALL_AT:
        # Probability that none of the tied right items is among the k − higher places left in the list.
        miss = torch.ones_like(ranks)
        for place in range(k):
            drawn = torch.clamp(wrong - place, min=0) / torch.clamp(wrong + right - place, min=1)
            miss = torch.where(place < k - higher, miss * drawn, miss)
        metrics[f"R@{k}"] = float((1 - miss).mean())
    return metrics
