"""Log-normalizers of anchors over a whole data set that streams by: exact, in memory that does not depend on its size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.collectives import exact_float32, gather_rows


class Anchors(NamedTuple):
    """Samples whose normalizers are asked for.

    image_features, text_features: [P, d] float32, L2-normalised; index: [P] int64, their places in the data set;
    logit_scale: [2, P], 1/τ of each as image and as text anchor.
    """

    image_features: Tensor
    text_features: Tensor
    index: Tensor
    logit_scale: Tensor


class StreamedNormalizers:
    """α1_i = log(ε + 1/(n−1)·Σ_{j≠i} exp((e1_i·e2_j − e1_i·e2_i)/τ)) and α2_i likewise (FastCLIP, arXiv 2407.01445, eq. 1).

    Every rank adds its own share of the n samples; sums are kept as logarithms in float64.

    Args:
        anchors: the same on every rank.
        block: anchors scored at a time against a batch of candidates.
    """

    def __init__(self, anchors: Anchors, block: int = 4096) -> None:
        self.anchors = anchors
        self.block = block
        self.positive = (anchors.image_features * anchors.text_features).sum(1)
        shape = (2, len(self.positive))
        self.log_sums = torch.full(shape, -math.inf, dtype=torch.float64, device=self.positive.device)
        self.seen = 0

    @torch.no_grad()
    def add(self, image_features: Tensor, text_features: Tensor, index: Tensor) -> None:
        """Let candidates pass: features [C, d] float32, L2-normalised; index [C] int64."""
        device = self.positive.device
        self.seen += len(index)
        index = index.to(device)
        sides = ((self.anchors.image_features, text_features), (self.anchors.text_features, image_features))
        with exact_float32(device):
            for side, (anchors, candidates) in enumerate(sides):
                for start in range(0, len(anchors), self.block):
                    rows = slice(start, start + self.block)
                    logits = anchors[rows] @ candidates.T
                    logits.sub_(self.positive[rows, None]).mul_(self.anchors.logit_scale[side, rows, None])
                    logits.masked_fill_(self.anchors.index[rows, None] == index[None], -math.inf)
                    here = torch.logsumexp(logits, dim=1).double()
                    self.log_sums[side, rows] = torch.logaddexp(self.log_sums[side, rows], here)

    def log_normalizers(self, log_eps: float, world_size: int = 1) -> tuple[Tensor, int]:
        """α of all anchors, [2, P] float64, and n, over what all ranks have added; all call it together.

        Raises:
            ValueError: fewer than two samples were added, so that no anchor has a negative.
        """
        device = self.log_sums.device
        total = int(gather_rows(torch.tensor([[self.seen]], device=device), world_size).sum())
        if total < 2:
            raise ValueError(f"{total} samples were added: a normalizer needs at least two.")
        by_rank = gather_rows(self.log_sums[None].flatten(1), world_size).view(-1, *self.log_sums.shape)
        log_means = torch.logsumexp(by_rank, dim=0) - math.log(total - 1)
        return torch.logaddexp(log_means, log_means.new_tensor(log_eps)), total
