"""Labelled images of a set in shards, with the metadata vectors that the sets of WILDS and of fairness have."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.datasets import ShardIndex, Share, Transform, class_number, decode_image
from evaluation.errors import UserError

# Where a sample has images in several formats, the public code takes the first of these.
IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")


class LabelledImages(Share):
    """Images in shards with a class (`cls`), a metadata vector (`npy`), or both.

    Args:
        shards: paths of the tar files.
        transform: PIL image (RGB) → anything a DataLoader can collate.
        number_of_classes: labels must be below it; None for a set without labels.
        fields: length of the metadata vector; 0 for a set without metadata.
        rank, world_size: the share of the samples that `len` and indexing see.

    A sample is a dict of `image`, `facts` ([1 + fields] float64: the label and the metadata; the label is left out in a set
    without) and `index` (global index, int).

    Raises:
        UserError: for a missing or broken shard, a sample without one of its members, and shards without a sample; on
            reading, for a bad label, a bad vector, or an image that cannot be decoded.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        transform: Transform,
        *,
        number_of_classes: int | None,
        fields: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.index = ShardIndex(shards)
        if not len(self.index):
            raise UserError(f"{shards[0].parent}: its shards hold no sample; fetch them again.")
        super().__init__(len(self.index), rank, world_size)
        self.transform, self.number_of_classes, self.fields = transform, number_of_classes, fields
        wanted = {"cls"} if number_of_classes is not None else set()
        wanted |= {"npy"} if fields else set()
        for i, members in enumerate(self.index.members):
            lacking = sorted(wanted - set(members))
            if not any(extension in members for extension in IMAGE_EXTENSIONS):
                lacking.append("image (" + ", ".join(IMAGE_EXTENSIONS) + ")")
            if lacking:
                # Left out, the number would be one of another set.
                raise UserError(f"{self.index.name(i)} has no {' and no '.join(lacking)}; fetch the shard again.")

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = self.global_index(position)
        members, name = self.index.members[i], self.index.name(i)
        facts: list[float] = []
        if self.number_of_classes is not None:
            facts.append(class_number(self.index.read(members["cls"]), self.number_of_classes, name))
        if self.fields:
            facts.extend(metadata_vector(self.index.read(members["npy"]), self.fields, name))
        extension = next(extension for extension in IMAGE_EXTENSIONS if extension in members)
        image = decode_image(self.index.read(members[extension]), name)
        return {"image": self.transform(image), "facts": torch.tensor(facts, dtype=torch.float64), "index": i}


def metadata_vector(content: bytes, fields: int, name: str) -> list[float]:
    """The first `fields` numbers of an `npy` member.

    Raises:
        UserError: if it is no vector of at least that many numbers, with `name` in the message. Nothing is unpickled.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        # What numpy raises at damage depends on where it is: ValueError, EOFError, MemoryError, SyntaxError …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: its npy cannot be read ({reason}); fetch the shard again.") from None
    if array.ndim != 1 or len(array) < fields or array.dtype.kind not in "biuf":
        shape = f"{array.dtype} of shape {array.shape}"
        raise UserError(f"{name}: its npy is {shape}; it must be a vector of {fields} numbers.")
    return [float(value) for value in array[:fields]]


def column(facts: Tensor, place: int, name: str) -> Tensor:
    """One column of the facts as whole numbers, [n] int64; fractions are cut off, as the public code does.

    Raises:
        UserError: for a value that is not finite, negative or beyond 2^31, with `name` in the message.
    """
    values = facts[:, place]
    if not bool(((values >= 0) & (values < 2**31)).all()):
        raise UserError(
            f"metadata field {name!r} has values that are no group numbers (0, 1, 2 …); fetch the set again."
        )
    return values.long()
