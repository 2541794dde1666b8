"""Tables of the Hugging Face hub read by row number: parquet files, or the Arrow files that the datasets library prepares."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps

from evaluation.datasets import decode_image
from evaluation.errors import UserError

T = TypeVar("T")

ORIENTATION = 0x0112  # the Exif tag
ARROW_FILE_MARK = b"ARROW1"


class Rows:
    """The rows of one or more parquet or Arrow files with the same columns.

    A process holds one row group (parquet) or maps the file (Arrow), so memory does not grow with the table, and every
    process opens the files for itself.

    Args:
        files: paths, in order; all parquet or all Arrow.
        columns: the columns that must be there.

    Raises:
        UserError: if pyarrow is not installed, a file is broken or lacks a column, or there is no row.
    """

    def __init__(self, files: Sequence[Path], columns: Sequence[str]) -> None:
        self.files = [Path(file) for file in files]
        self._open: tuple[int, int, Any] | None = None
        self._held: tuple[tuple[int, int, int, str], Any] | None = None
        # Global number of the first row of every group, and which group (file, number in the file) it is.
        self._starts: list[int] = []
        self._groups: list[tuple[int, int]] = []
        self._total = 0
        for number, file in enumerate(self.files):
            names, sizes = self._guard(number, partial(self._layout, number))
            missing = sorted(set(columns) - set(names))
            if missing:
                raise UserError(f"{file} has no column {missing[0]!r}, only {', '.join(names)[:200]}; fetch it again.")
            for group, size in enumerate(sizes):
                if size:
                    self._starts.append(self._total)
                    self._groups.append((number, group))
                    self._total += size
        if not self._total:
            raise UserError(f"{self.files[0]} holds no row; fetch it again.")

    def __len__(self) -> int:
        return self._total

    def value(self, i: int, column: str) -> Any:
        """What row i has in a column, as Python objects."""
        place = bisect.bisect_right(self._starts, i) - 1
        offset = i - self._starts[place]
        file = self._groups[place][0]
        return self._guard(file, lambda: self._group(place, column)[offset].as_py())

    def column(self, column: str) -> list[Any]:
        """All of a column, as Python objects."""
        values: list[Any] = []
        for place, (file, _) in enumerate(self._groups):
            values.extend(self._guard(file, partial(self._listed, place, column)))
        return values

    def strings(self, column: str) -> list[list[str]]:
        """All of a column of lists of strings.

        Raises:
            UserError: for a row with anything else, or with an empty list.
        """
        values = self.column(column)
        for i, value in enumerate(values):
            if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
                raise UserError(
                    f"{self.name(i)}: {column} must be a list of strings, not empty; fetch the table again."
                )
        return values

    def name(self, i: int) -> str:
        """Row i in words, for messages."""
        file = self.files[self._groups[bisect.bisect_right(self._starts, i) - 1][0]]
        return f"row {i} of {file}" if len(self.files) == 1 else f"row {i} of the table that {file} belongs to"

    def _layout(self, number: int) -> tuple[list[str], list[int]]:
        return _layout(self._reader(number))

    def _listed(self, place: int, column: str) -> list[Any]:
        return self._group(place, column).to_pylist()

    def _group(self, place: int, column: str) -> Any:
        """One column of a row group."""
        key = (os.getpid(), *self._groups[place], column)
        if self._held is None or self._held[0] != key:
            self._held = None  # before the next is read, so that only one is held
            self._held = key, _read(self._reader(self._groups[place][0]), self._groups[place][1], column)
        return self._held[1]

    def _reader(self, number: int) -> Any:
        if self._open is None or self._open[:2] != (os.getpid(), number):
            self._open = None
            self._open = (os.getpid(), number, _opened(self.files[number]))
        return self._open[2]

    def _guard(self, number: int, read: Callable[[], T]) -> T:
        try:
            return read()
        except UserError:
            raise
        except Exception as error:
            # pyarrow raises ArrowInvalid, OSError, UnicodeDecodeError … for damage, whatever its place.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.files[number]} cannot be read ({reason}); fetch it again.") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_held": None}


def _opened(file: Path) -> Any:
    """A pyarrow.parquet.ParquetFile, or the record batches of an Arrow file in mapped memory."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow to be read: pip install pyarrow.") from None
    if file.suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(file)
    source = pyarrow.memory_map(str(file), "r")
    with file.open("rb") as start:
        framed = start.read(len(ARROW_FILE_MARK)) == ARROW_FILE_MARK
    reader = pyarrow.ipc.open_file(source) if framed else pyarrow.ipc.open_stream(source)
    return reader.read_all().to_batches()


def _layout(reader: Any) -> tuple[list[str], list[int]]:
    """Names of the columns, and the number of rows of every group."""
    if isinstance(reader, list):
        return (reader[0].schema.names if reader else []), [len(batch) for batch in reader]
    metadata = reader.metadata
    return reader.schema_arrow.names, [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _read(reader: Any, group: int, column: str) -> Any:
    if isinstance(reader, list):
        return reader[group].column(column)
    # In this thread: a forked loader process has none of its parent's threads.
    return reader.read_row_group(group, columns=[column], use_threads=False).column(column)


def image_content(value: Any, name: str) -> bytes:
    """The file's content of an image in a table: {bytes, path}, or plain bytes.

    Raises:
        UserError: if there are no bytes and no file at the path, with `name` in the message.
    """
    if isinstance(value, bytes):
        return value
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
    if isinstance(content, bytes):
        return content
    if isinstance(path, str) and Path(path).is_file():
        return Path(path).read_bytes()
    raise UserError(f"{name}: its image has no bytes and no file at its path ({path}); fetch the table again.")


def decode_table_image(content: bytes, name: str) -> Image.Image:
    """Decode an image of a table as the datasets library does: turned as its Exif data say, in the mode of the file.

    open_clip's transform resizes before it converts to RGB, so the mode makes a difference for palettes and transparency.
    In shards, webdataset's decoder converts first.

    Raises:
        UserError: if the bytes are no image, with `name` in the message.
    """
    image = decode_image(content, name, mode=None)
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION) is not None else image
