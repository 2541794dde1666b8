"""Data by row number: a csv file of image paths and captions, and a synthetic stand-in for data."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image

from training.data.config import DataConfig
from training.data.plan import Layout, Pass, Place
from training.data.runs import Runs
from training.data.samples import RawSample
from training.data.seeds import Purpose, derive_seed
from training.errors import AbsentDataError, UserError

SYNTHETIC_STEPS = 100
SYNTHETIC_CAPTION = "a picture of random pixels, to try the code without data"
# A consumer whose own rows are all broken looks at this many others before it gives up.
SPARE_ROWS = 1000


class PackedStrings(Sequence[bytes]):
    """Many strings in two arrays: worker processes share them, where a list would be copied page by page."""

    def __init__(self, strings: Iterable[str]) -> None:
        # Bytes that are not utf-8 come back as they were, for the sample that holds them to be skipped.
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        begin = self._ends[index - 1] if index else 0
        return self._blob[begin : self._ends[index]].tobytes()

    @property
    def num_bytes(self) -> int:
        """Of all strings together."""
        return len(self._blob)


class Rows(Protocol):
    """Samples by row number."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> RawSample:
        """The sample of row `index`, with that number as its key."""
        ...


class CsvRows:
    """The rows of a csv file."""

    def __init__(self, path: str, images: PackedStrings, captions: PackedStrings) -> None:
        """images: a file path per row; captions: a text per row, both utf-8."""
        self.path = path
        self.images = images
        self.captions = captions

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int) -> RawSample:
        """Row `index`, counted from 0 below the header. An image path is used as it stands."""
        return RawSample(
            os.fsdecode(self.images[index]), self.captions[index], index, f"{self.path} row {index}", self.path
        )


class SyntheticRows:
    """One fixed random image and caption, as many times as asked for."""

    def __init__(self, count: int, seed: int) -> None:
        generator = np.random.default_rng(derive_seed(Purpose.SYNTHETIC_IMAGE, seed))
        self.image = Image.fromarray(generator.integers(0, 256, (224, 224, 3), dtype=np.uint8))
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> RawSample:
        """The same picture and caption for every index."""
        return RawSample(self.image, SYNTHETIC_CAPTION, index, f"synthetic sample {index}", "synthetic")


def read_csv(config: DataConfig) -> CsvRows:
    """The table at train_data, read whole (and remembered while the file does not change).

    Raises:
        UserError: no such file (AbsentDataError), several files, columns that are not there, or lines that are not csv.
    """
    path = config.train_data or ""
    if not os.path.isfile(path):
        hint = "; only shards can be joined by ::" if "::" in path else "; correct the path"
        raise AbsentDataError(f"--train-data {path}: there is no such csv file{hint}")
    stat = os.stat(path)
    # A shell passes '\t' on as two characters.
    separator = config.csv_separator.replace("\\t", "\t")
    if len(separator) != 1:
        raise UserError(f"--csv-separator is {config.csv_separator!r}: give a single character")
    return _read_csv(path, config.csv_img_key, config.csv_caption_key, separator, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_csv(path: str, image_key: str, caption_key: str, separator: str, _bytes: int, _changed_ns: int) -> CsvRows:
    images: list[str] = []
    captions: list[str] = []
    # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=separator)
        try:
            header = next(reader, [])
            image_column, caption_column = _columns(path, header, (image_key, caption_key), separator)
            for row in reader:
                if not row:
                    continue
                # A short row keeps its number, so that keys stay put; without an image path it is skipped later.
                whole = len(row) > max(image_column, caption_column)
                images.append(row[image_column] if whole else "")
                captions.append(row[caption_column] if whole else "")
        except csv.Error as error:
            raise UserError(f"--train-data {path}, line {reader.line_num}: {error}; correct the file") from None
    return CsvRows(path, PackedStrings(images), PackedStrings(captions))


def _columns(path: str, header: list[str], wanted: tuple[str, str], separator: str) -> list[int]:
    missing = [name for name in wanted if name not in header]
    if not missing:
        return [header.index(name) for name in wanted]
    flags = "--csv-img-key, --csv-caption-key"
    others = [mark for mark in ",\t;|" if mark != separator and len(header) == 1 and mark in header[0]]
    if others:
        flags = f"--csv-separator {others[0]!r} (now {separator!r})"
    raise UserError(
        f"--train-data {path} has no column {' and no column '.join(map(repr, missing))}, its columns are "
        f"{', '.join(map(repr, header)) or 'none'}: give {flags}"
    )


class RowSource:
    """Rows in a new permutation each epoch, a range of it for each consumer; every row at most once in an epoch."""

    def __init__(self, rows: Rows, layout: Layout, row: Runs | None = None) -> None:
        """rows: the table. row: positions of the permutation, at least layout.num_samples; None for all."""
        self.rows = rows
        self.layout = layout
        self.row = Runs.of(0, len(rows)) if row is None else row

    def rest(self, layout: Layout, row: Runs) -> RowSource:
        """What is left of an epoch, for another layout."""
        return RowSource(self.rows, layout, row)

    def count(self, place: Place, which: Pass) -> int:
        """The rows of a pass."""
        if which.spare:
            return min(SPARE_ROWS, len(self.rows))
        return len(self._own(place))

    def slots(self, place: Place, which: Pass, first: int = 0) -> Iterator[RawSample]:
        """A pass from a row on: the consumer's own, in another order on later attempts, or rows from anywhere."""
        return map(self.rows.sample, map(int, self._numbers(place, which)[first:]))

    def chosen(self, place: Place, which: Pass, numbers: np.ndarray) -> Iterator[RawSample]:
        """Single rows of a pass; numbers: [m] int64."""
        return map(self.rows.sample, map(int, self._numbers(place, which)[numbers]))

    def names(self, place: Place) -> str:
        """Some of the rows a consumer reads in an epoch, for messages."""
        numbers = self._numbers(place, Pass())
        return f"{self.rows.sample(int(numbers[0])).name} and {len(numbers) - 1} more rows"

    def _own(self, place: Place) -> Runs:
        return self.row.part(*self.layout.sample_range(place))

    def _numbers(self, place: Place, which: Pass) -> np.ndarray:
        if which.spare:
            seed = self.layout.derive(Purpose.SPARE_SHARDS, *place, which.attempt)
            return np.random.default_rng(seed).permutation(len(self.rows))[:SPARE_ROWS]
        # The same in all segments of an epoch, which share its positions.
        seed = derive_seed(Purpose.EPOCH_ORDER, self.layout.seed, place.epoch)
        mine = np.random.default_rng(seed).permutation(len(self.rows))[self._own(place).positions()]
        if which.attempt:
            seed = self.layout.derive(Purpose.OWN_SHARDS, *place, which.attempt)
            mine = np.random.default_rng(seed).permutation(mine)
        return mine
