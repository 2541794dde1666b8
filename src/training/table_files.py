"""Per-sample tables that are too large for a checkpoint file, in parts beside it; every rank writes the rows that it holds.

    checkpoints/epoch_3.pt                       names the folder
    checkpoints/tables-5400-1f0c9a2e/            5400: the step
        table.000000000000-000119999999.pt       rows by their numbers, so that any number of ranks can read them
        table.000120000000-000239999999.pt

Each folder is written once, under a name of its own, before the checkpoint that names it appears. It is removed when no
checkpoint names it any more.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.sample_tables import PART, large_tables, read_part, table_parts
from neuclip.normalizers import ShardedTable
from neuclip.objectives import Objective
from training.atomic_files import read_sidecar, write_atomically
from training.distributed import World
from training.errors import UNREADABLE, UserError, reason_of

# Larger parts would only need more memory while they are copied from a GPU.
PART_BYTES = 10**9


def describe_tables(objective: Objective) -> dict[str, int]:
    """The rows that each large table has on all ranks together, by its name: what a checkpoint says of them."""
    return {name: table.rows for name, table in large_tables(objective).items()}


def save_tables(objective: Objective, checkpoints: Path, step: int, world: World) -> str | None:
    """Write all parts. Every rank calls it; when it returns, all have written theirs.

    Returns:
        The name of the folder within `checkpoints`; None if there is nothing to write.

    Raises:
        OSError: a part cannot be written; on all ranks, with what the first of them was told by its file system. What the
            others wrote is removed with the next checkpoint (`remove_unused`).
    """
    tables = large_tables(objective)
    if not tables:
        return None
    folder = checkpoints / world.from_main(f"tables-{step}-{secrets.token_hex(4)}")

    def write() -> None:
        try:
            _write_parts(tables, folder)
        except OSError as error:
            raise UserError(f"cannot save {folder}: {error.strerror or error}") from error

    try:
        world.check_together(write)
    except UserError as error:
        # An error of one rank's machine, no mistake of the user's, and one that training may survive.
        raise OSError(str(error)) from error
    return folder.name


def missing_parts(folder: Path, rows: dict[str, int] | None) -> str | None:
    """What is wrong with a folder of tables, in words; None if all parts are there and as long as they were written.

    Args:
        rows: of each table (`describe_tables`); None where the checkpoint does not say, being of an older version.
    """
    found = {match["name"] for path in folder.glob("*.pt") if (match := PART.fullmatch(path.name))}
    if not found:
        return f"its per-sample tables in {folder} are not there"
    for name in sorted(found | set(rows or ())):
        parts = list(table_parts(folder, name))
        expected = 0
        for path, first, last in parts:
            if first != expected:
                break
            if not _is_complete(path):
                return f"{path} is not as long as it was written"
            expected = last + 1
        end = rows[name] if rows is not None and name in rows else parts[-1][2] + 1
        if expected != end:
            return f"its per-sample tables in {folder} end at row {expected} of {end}"
    return None


def table_folders(checkpoints: Path) -> list[Path]:
    """All folders of tables, needed or not."""
    return [path for path in checkpoints.glob("tables-*") if path.is_dir()]


def remove_unused(checkpoints: Path, among: Sequence[Path] | None = None) -> list[Path]:
    """Remove the tables that no checkpoint names: those of replaced checkpoints, and what a process left that was killed.

    Where a checkpoint cannot be read nothing is removed, since nobody knows what it needs.

    Args:
        among: leave alone all folders but these; None for none. Who removes in the background names those that were there
            before, since parts of the next checkpoint may be on their way already.

    Returns:
        The folders that were removed.
    """
    folders = table_folders(checkpoints) if among is None else [path for path in among if path.is_dir()]
    needed = set()
    for path in checkpoints.glob("*.pt") if folders else ():
        try:
            # Mapped: of the file no more is read than what it holds and where.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UNREADABLE as error:
            logging.warning("%s cannot be read (%s): no tables are removed", path, reason_of(error))
            return []
        needed.add(content.get("tables") if isinstance(content, dict) else None)
    unused = [folder for folder in folders if folder.name not in needed]
    for folder in unused:
        shutil.rmtree(folder)
    return unused


def _write_parts(tables: dict[str, ShardedTable], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        rows = table.local_rows()
        step = max(1, PART_BYTES // (rows.shape[1] * rows.element_size()))
        for begin in range(0, len(rows), step):
            # A copy of its own: a view would be saved with everything it is a view of.
            part = rows[begin : begin + step].to("cpu", copy=True)
            first = table.first_row + begin
            write_atomically(folder / f"{name}.{first:012d}-{first + len(part) - 1:012d}.pt", part)


def _is_complete(path: Path) -> bool:
    record = read_sidecar(path)
    if record is not None:
        return bool(record["bytes"] == path.stat().st_size)
    try:
        read_part(path)
    except UserError:
        return False
    return True
