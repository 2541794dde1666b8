"""Reading per-sample tables that are too large for a checkpoint file, from the parts beside it (`training.table_files`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from evaluation.errors import UNREADABLE, UserError, reason_of
from neuclip.normalizers import ShardedTable
from neuclip.objectives import Objective

PART = re.compile(r"(?P<name>.+)\.(?P<first>\d{12,})-(?P<last>\d{12,})\.pt")


def large_tables(objective: Objective) -> dict[str, ShardedTable]:
    """The objective's tables that its state dict leaves out, by the name of their module."""
    return {
        name: module
        for name, module in objective.named_modules()
        if isinstance(module, ShardedTable) and not module.in_state_dict
    }


def load_tables(objective: Objective, folder: Path) -> None:
    """Fill the rows that this rank holds from the parts that have them.

    Raises:
        UserError: parts are missing or unreadable.
    """
    for name, table in large_tables(objective).items():
        expected = 0
        for path, first, last in table_parts(folder, name):
            if first != expected:
                break
            expected = last + 1
            if first < table.first_row + table.num_local_rows and last >= table.first_row:
                table.fill(first, read_part(path))
        if expected != table.rows:
            raise UserError(
                f"the per-sample tables in {folder} are needed and end at row {expected} of {table.rows}: "
                "keep that folder beside its checkpoint"
            )


def table_parts(folder: Path, name: str) -> Iterator[tuple[Path, int, int]]:
    """(file, first row, last row) of a table's parts in the order of their rows."""
    found = []
    for path in folder.glob("*.pt") if folder.is_dir() else ():
        match = PART.fullmatch(path.name)
        if match is not None and match["name"] == name:
            found.append((int(match["first"]), int(match["last"]), path))
    for first, last, path in sorted(found):
        yield path, first, last


def read_part(path: Path) -> torch.Tensor:
    """[rows, columns] of one part.

    Raises:
        UserError: it cannot be read.
    """
    try:
        # Mapped, not read: of a part that two ranks share each copies its rows only.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as part of a table: {reason_of(error)}") from None
