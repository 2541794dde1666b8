"""Retrieval with several captions per image: Flickr30k and MSCOCO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evaluation.collectives import exact_float32
from evaluation.datacomp.labelled import IMAGE_EXTENSIONS
from evaluation.datacomp.rows import Rows, decode_table_image, image_content
from evaluation.datasets import ShardIndex, Share, Transform, decode_image
from evaluation.errors import UserError

RECALL_AT = (1, 5, 10)


class CaptionedImages(Protocol):
    """Images by number with their captions."""

    captions: list[list[str]]

    def image(self, i: int) -> Any:
        """The PIL image number i."""


class TableImages:
    """The images and captions of a table with the columns image and caption.

    Raises:
        UserError: for a broken table, or captions that are no lists of strings.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.rows = Rows(files, ("image", "caption"))
        self.captions = self.rows.strings("caption")

    def image(self, i: int) -> Any:
        """The PIL image of row i, in the mode of its file."""
        name = self.rows.name(i)
        return decode_table_image(image_content(self.rows.value(i, "image"), name), name)


class ShardImages:
    """The images and captions of clip_benchmark's retrieval shards: an image and a txt with one caption a line.

    Raises:
        UserError: for a broken shard, a sample without an image or captions, or captions that are not UTF-8.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.index = ShardIndex(shards)
        if not len(self.index):
            raise UserError(f"{shards[0].parent}: its shards hold no sample; fetch them again.")
        self.captions = [self._captions(i) for i in range(len(self.index))]

    def image(self, i: int) -> Any:
        """The PIL image of sample i, RGB."""
        members = self.index.members[i]
        extension = next(extension for extension in IMAGE_EXTENSIONS if extension in members)
        return decode_image(self.index.read(members[extension]), self.index.name(i))

    def _captions(self, i: int) -> list[str]:
        members, name = self.index.members[i], self.index.name(i)
        if "txt" not in members or not any(extension in members for extension in IMAGE_EXTENSIONS):
            raise UserError(f"{name} lacks its image or its txt; fetch the shard again.")
        try:
            captions = self.index.read(members["txt"]).decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{name}: its txt is not UTF-8; fetch the shard again.") from None
        if not captions:
            raise UserError(f"{name}: its txt holds no caption; fetch the shard again.")
        return captions


class ImageShare(Share):
    """One rank's share of the images; a sample is a dict of `image` (transformed) and `index` (global index, int)."""

    def __init__(self, source: CaptionedImages, transform: Transform, rank: int, world_size: int) -> None:
        super().__init__(len(source.captions), rank, world_size)
        self.source, self.transform = source, transform

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = self.global_index(position)
        return {"image": self.transform(self.source.image(i)), "index": i}


def recall_metrics(images: Tensor, texts: Tensor, text_images: Tensor, block: int = 1024) -> dict[str, float]:
    """Recall at 1, 5 and 10 as CLIP-like papers count it: a hit is one right item among the top k.

    Args:
        images: [N, d] float32, L2-normalised.
        texts: [M, d] float32, L2-normalised.
        text_images: [M] int64: the image that each text belongs to.
        block: rows scored at a time.

    Returns:
        `image_retrieval_recall@k` (share of texts with their image among the k best), `text_retrieval_recall@k` (share of
        images with one of their texts among the k best) and `mean_recall@1`, half the sum of both at 1.
    """
    image_ids = torch.arange(len(images), device=images.device)
    text_images = text_images.to(images.device)
    metrics: dict[str, float] = {}
    for way, anchors, ids, candidates, candidate_ids in (
        ("image", texts, text_images, images, image_ids),
        ("text", images, image_ids, texts, text_images),
    ):
        most = min(max(RECALL_AT), len(candidates))
        hits = torch.zeros(most, dtype=torch.int64, device=images.device)
        with torch.no_grad(), exact_float32(images.device):
            for start in range(0, len(anchors), block):
                rows = slice(start, start + block)
                best = (anchors[rows] @ candidates.T).topk(most, dim=1).indices
                right = (candidate_ids[best] == ids[rows, None]).long()
                hits += right.cummax(1).values.sum(0)
        shares = (hits.double() / len(anchors)).tolist()
        metrics.update({f"{way}_retrieval_recall@{k}": shares[min(k, most) - 1] for k in RECALL_AT})
    metrics["mean_recall@1"] = (metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]) / 2
    return metrics
