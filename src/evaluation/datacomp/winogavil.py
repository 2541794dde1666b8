"""WinoGAViL (Bitton et al., 2022): which of 5 to 12 candidate images are associated with a cue."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evaluation.datacomp.rows import Rows, decode_table_image, image_content
from evaluation.datasets import Share, Transform
from evaluation.errors import UserError

VOWELS = "aeiou"


class Instances:
    """The instances of the table (columns cue, candidates, associations, candidate_images).

    An image is a candidate of many instances; equal files are kept once.

    Args:
        files: the parquet or Arrow files.

    Attributes:
        prompts: for every instance, the text of its cue.
        associated: for every instance, which of its candidates are associations, [n] bool.
        images: for every instance, the numbers of its candidates' images.
        places: for every image, the (row, place in the row) where it is read.

    Raises:
        UserError: for a broken table, a row whose columns do not fit each other, or one without an association.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.rows = Rows(files, ("cue", "candidates", "associations", "candidate_images"))
        candidates, associations = self.rows.strings("candidates"), self.rows.strings("associations")
        self.prompts: list[str] = []
        self.associated = [np.isin(names, right) for names, right in zip(candidates, associations)]
        self.images: list[list[int]] = []
        self.places: list[tuple[int, int]] = []
        numbers: dict[bytes, int] = {}
        for row, cue in enumerate(self.rows.column("cue")):
            name = self.rows.name(row)
            if not isinstance(cue, str) or not cue:
                raise UserError(f"{name} has no cue; fetch the table again.")
            if not self.associated[row].any():
                raise UserError(f"{name}: none of its candidates is an association; fetch the table again.")
            self.prompts.append(prompt(cue))
            digests = self._digests(row, len(candidates[row]))
            for place, digest in enumerate(digests):
                if numbers.setdefault(digest, len(numbers)) == len(self.places):
                    self.places.append((row, place))
            self.images.append([numbers[digest] for digest in digests])

    def __len__(self) -> int:
        return len(self.prompts)

    def image(self, number: int) -> Any:
        """The PIL image of a number, in the mode of its file."""
        row, place = self.places[number]
        name = self.rows.name(row)
        value = self.rows.value(row, "candidate_images")[place]
        return decode_table_image(image_content(value, name), name)

    def _digests(self, row: int, number: int) -> list[bytes]:
        values, name = self.rows.value(row, "candidate_images"), self.rows.name(row)
        if not isinstance(values, list) or len(values) != number:
            raise UserError(
                f"{name} does not have one image for each of its {number} candidates; fetch the table again."
            )
        contents = (image_content(value, name) for value in values)
        return [hashlib.blake2b(content, digest_size=16).digest() for content in contents]


class InstanceImages(Share):
    """One rank's share of the distinct images; a sample is a dict of `image` (transformed) and `index` (int)."""

    def __init__(self, source: Instances, transform: Transform, rank: int, world_size: int) -> None:
        super().__init__(len(source.places), rank, world_size)
        self.source, self.transform = source, transform

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = self.global_index(position)
        return {"image": self.transform(self.source.image(i)), "index": i}


def prompt(cue: str) -> str:
    """The text of a cue: "A cue", or "An cue" before a, e, i, o, u, in lower case."""
    cue = cue.lower()
    return f"{'An' if cue[0] in VOWELS else 'A'} {cue}"


def jaccard_metrics(
    images: Tensor, texts: Tensor, instances: Sequence[Sequence[int]], associated: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """Mean Jaccard index of the chosen and the right candidates; as many are chosen as there are right ones.

    Args:
        images: [N, d] float32, L2-normalised.
        texts: [M, d] float32, L2-normalised: the cues.
        instances: for each of M instances, its candidates' rows in `images`.
        associated: for each, which candidates are right, [n] bool with at least one True.

    Returns:
        `avg_jaccard_score`, `jaccard_score_5`, `_6`, `_10`, `_12`, `_5-6` (up to 6 candidates) and `_10-12` (10 or more);
        None where no instance has that number of candidates.
    """
    images, texts = images.cpu(), texts.cpu()
    scores = []
    for text, numbers, right in zip(texts, instances, associated):
        order = np.argsort((images[list(numbers)] @ text).numpy())
        chosen = np.zeros(len(right), dtype=bool)
        chosen[order[-int(right.sum()) :]] = True
        scores.append((chosen & right).sum() / (chosen | right).sum())
    values, sizes = np.array(scores), np.array([len(numbers) for numbers in instances])
    wanted = {
        "avg_jaccard_score": sizes > 0,
        **{f"jaccard_score_{size}": sizes == size for size in (5, 6, 10, 12)},
        "jaccard_score_5-6": sizes <= 6,
        "jaccard_score_10-12": sizes >= 10,
    }
    return {name: float(values[those].mean()) if those.any() else None for name, those in wanted.items()}
