"""Files that take their name only when they are whole: a kill or a full disk leaves the old file or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to, with an ending of its own; the file takes the place of `path` at the end, unless
    the block raises.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in utf-8; the folder must exist.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())
