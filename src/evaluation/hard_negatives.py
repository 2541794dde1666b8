"""The hardest negatives: pairs that do not belong together and are more alike than those that do."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.collectives import exact_float32

# Two captions whose words agree by this much or more (Jaccard: words in both / words in either) say nearly the same.
NEAR_DUPLICATE = 0.6


class HardNegative(NamedTuple):
    """An anchor i that is more like a stranger's candidate j than other anchors are, relative to its own partner.

    Attributes:
        anchor, negative: i and j, indices of pairs.
        positive_similarity: s_ii, cosine similarity with its own partner.
        negative_similarity: s_ij, with the candidate of pair j.
    """

    anchor: int
    negative: int
    positive_similarity: float
    negative_similarity: float

    @property
    def margin(self) -> float:
        """s_ij − s_ii: above 0 where the stranger is nearer than the partner."""
        return self.negative_similarity - self.positive_similarity


class Negatives(NamedTuple):
    """For each of n anchors its hardest negative: index [n] int64 (−1: there is none) and similarity [n] float32 (−inf:
    none), and similarity with its own partner [n] float32. All on the CPU."""

    index: Tensor
    similarity: Tensor
    positive: Tensor


def hardest_negatives(anchors: Tensor, candidates: Tensor, caption_ids: Tensor, block: int = 1024) -> Negatives:
    """The candidate nearest to each anchor among those of pairs with another caption; memory O(block² + n).

    Args:
        anchors: [n, d] float32, L2-normalised: the features of images or of texts.
        candidates: [n, d] float32, L2-normalised: the other side of the same pairs.
        caption_ids: [n] int64, equal for equal captions.
        block: anchors, and candidates, compared at a time.

    Returns:
        The hardest negatives; of equally near ones the first.

    Raises:
        ValueError: if the three do not have the same length.
    """
    number = len(anchors)
    if len(candidates) != number or caption_ids.shape != (number,):
        raise ValueError(f"{number} anchors, {len(candidates)} candidates, {len(caption_ids)} captions: not the same.")
    ids = caption_ids.to(anchors.device)
    index = torch.full((number,), -1, dtype=torch.int64, device=anchors.device)
    best = torch.full((number,), -torch.inf, device=anchors.device)
    with torch.no_grad(), exact_float32(anchors.device):
        for first in range(0, number, block):
            rows = slice(first, first + block)
            for start in range(0, number, block):
                columns = slice(start, start + block)
                scores = anchors[rows] @ candidates[columns].T
                scores[ids[rows, None] == ids[None, columns]] = -torch.inf
                values, places = scores.max(dim=1)
                better = values > best[rows]
                best[rows] = torch.where(better, values, best[rows])
                index[rows] = torch.where(better, places + start, index[rows])
        positive = (anchors * candidates).sum(dim=1)
    return Negatives(index.cpu(), best.cpu(), positive.cpu())


def worst(negatives: Negatives, number: int) -> list[HardNegative]:
    """The anchors with the largest s_ij − s_ii, largest first, each with its hardest negative.

    An anchor is listed once. Of all pairs (i, j) the largest margins mostly belong to a few anchors whose own partner is far
    away, each with many candidates; that would hide the others.

    Args:
        negatives: of all anchors.
        number: how many to list; fewer where there are fewer anchors with a negative.
    """
    margins = (negatives.similarity - negatives.positive).double()
    order = margins.argsort(descending=True, stable=True)[:number].tolist()
    return [
        HardNegative(i, int(negatives.index[i]), negatives.positive[i].item(), negatives.similarity[i].item())
        for i in order
        if negatives.index[i] >= 0
    ]


def near_duplicates(caption: str, other: str) -> bool:
    """Whether two captions say nearly the same: their sets of words have a Jaccard index of NEAR_DUPLICATE or more."""
    words, others = (set(re.findall(r"\w+", text.casefold())) for text in (caption, other))
    return bool(words | others) and len(words & others) >= NEAR_DUPLICATE * len(words | others)
