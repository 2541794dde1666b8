"""Files that appear under their name only when they are whole, with a record of what was written beside them.

    epoch_3.pt
    epoch_3.pt.json     its sidecar: {"bytes": 1204, "sha256": "9f…", "written_ns": 1760000000000000000, "epoch": 3, …}

A crash at any point leaves the old file or the new one, whole, and no sidecar of another file than the one beside it: the old
sidecar is gone before the file is replaced, the new one comes after. A file without a sidecar (from an older version, or from
a crash between the two) is judged by reading it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from training.errors import UNREADABLE, reason_of


def sidecar_of(path: Path) -> Path:
    """Where the record of a file stands: NAME.json, which no glob for *.pt finds."""
    return path.with_name(f"{path.name}.json")


def temporary_of(path: Path) -> Path:
    """The name under which this process writes `path` until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: Any, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """torch.save so that `path` is never half-written, not even by a crash of the machine, with a sidecar.

    It is written under a temporary name, `.NAME.PID.tmp`, flushed to the disk and renamed.

    Args:
        content: nested dicts and lists of tensors and plain values. Tensors go to the file from wherever they are.
        facts: what else the sidecar says (plain values), the step for example.

    Returns:
        What the sidecar says: "bytes", "sha256" (hexadecimal), "written_ns" (since 1970, of this machine's clock), the facts.

    Raises:
        OSError: the file cannot be written; nothing of it is left.
    """
    temporary = temporary_of(path)
    try:
        record = {**_save(temporary, content), "written_ns": time.time_ns(), **(facts or {})}
        put_in_place(temporary, path, record)
    finally:
        discard(temporary)
    return record


def link_atomically(source: Path, path: Path, record: dict[str, Any]) -> None:
    """Give a whole file a second name with a sidecar of its own; a copy where the file system knows no hard links.

    Args:
        record: what the sidecar of `source` says.

    Raises:
        OSError: neither can be done.
    """
    temporary = temporary_of(path)
    discard(temporary)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        put_in_place(temporary, path, record)
    finally:
        # Renaming one of two names of the same file to the other does nothing, and leaves both.
        discard(temporary)


def put_in_place(temporary: Path, path: Path, record: dict[str, Any]) -> None:
    """Rename a file that is on the disk to `path` and put its sidecar beside it.

    The folder is flushed after each step: the order of two changes to a folder is otherwise the file system's choice.
    """
    sidecar = sidecar_of(path)
    new_sidecar = temporary_of(sidecar)
    try:
        with open(new_sidecar, "wb") as file:
            file.write(json.dumps(record).encode())
            file.flush()
            os.fsync(file.fileno())
        if sidecar.exists():
            os.unlink(sidecar)
            _flush_folder(path.parent)
        os.replace(temporary, path)
        _flush_folder(path.parent)
        os.replace(new_sidecar, sidecar)
        _flush_folder(path.parent)
    finally:
        discard(new_sidecar)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, without a sidecar; it takes the name `path` where the block ends without an exception.

    Raises:
        OSError: the file cannot be written; the old one is still there.
    """
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        discard(temporary)


def remove(path: Path) -> None:
    """Remove a file and its sidecar, if they are there.

    Raises:
        OSError: one of them cannot be removed.
    """
    sidecar_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a temporary file as well as can be: what already went wrong is what the caller wants to know."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What the sidecar of `path` says; None without one, and for one that cannot be understood."""
    try:
        record = json.loads(sidecar_of(path).read_bytes())
    except (OSError, ValueError):
        return None
    return record if is_record(record) else None


def is_record(value: Any) -> bool:
    """Whether a value read from JSON is what a sidecar says."""
    return isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("sha256"), str)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path) -> str | None:
    """What is wrong with a file that was written here, in words that follow its name; None if it is whole.

    It is read once: against its sidecar, or else against the checksums that torch.save puts into a file.
    """
    record = read_sidecar(path)
    if record is None:
        return _damage(path)
    try:
        length = path.stat().st_size
        if length != record["bytes"]:
            return f"it is {length:,} bytes long, {record['bytes']:,} were written"
        if digest(path) != record["sha256"]:
            return "its checksum differs from that of what was written"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def _damage(path: Path) -> str | None:
    try:
        if not zipfile.is_zipfile(path):
            torch.load(path, map_location="cpu", weights_only=True)
            return None
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        if part is not None:
            return f"its part {part} is damaged"
        # Mapped: what it holds and where. The rest has just been read.
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error, struct.error) as error:
        return f"it cannot be read ({reason_of(error)})"
    return None


class _Measured:
    """A file for torch.save, which writes from the first byte to the last: its length and checksum are known at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _save(path: Path, content: Any) -> dict[str, Any]:
    with open(path, "wb") as file:
        measured = _Measured(file)
        try:
            torch.save(content, measured)
        except RuntimeError:
            # From a write that fails torch goes on to its own end of the file, and what it says then is not the cause.
            if measured.error is not None:
                raise measured.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": measured.bytes, "sha256": measured.sha256.hexdigest()}


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
