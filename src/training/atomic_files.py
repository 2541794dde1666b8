"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, content: Any) -> None:
    """torch.save so that `path` is never half-written, not even by a crash of the machine.

    It is written under a temporary name, `.NAME.PID.tmp`, flushed to the disk and renamed.

    Args:
        content: nested dicts and lists of tensors and plain values. Tensors go to the file from wherever they are.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)
