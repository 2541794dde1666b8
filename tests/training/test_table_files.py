"""Tables in parts beside the checkpoint: written by some ranks, read by any number, never half, never lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from neuclip.normalizers import ShardedTable, table
from neuclip.objectives import Objective
from ranks import run_on_ranks
from training import table_files
from training.atomic_files import write_atomically
from training.distributed import World
from training.errors import UserError

ROWS = 13


class Remembering(Objective):
    """An objective with two tables."""

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        self.first = ShardedTable(rows, (0.0, 0.0))
        self.inner = nn.Module()
        self.inner.second = ShardedTable(rows, (1.0,))

    def set_rows(self) -> None:
        """Every row its number."""
        numbers = torch.arange(float(self.first.rows))
        self.first.write(torch.arange(self.first.rows), torch.stack((numbers, -numbers), dim=1))
        self.inner.second.write(torch.arange(self.first.rows), numbers[:, None] + 0.5)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "STATE_DICT_LIMIT", 0)
    monkeypatch.setattr(table_files, "PART_BYTES", 24)


def _make_large() -> None:
    table.STATE_DICT_LIMIT = 0
    table_files.PART_BYTES = 24


def save_on_a_rank(checkpoints: str) -> str:
    _make_large()
    objective = Remembering()
    objective.set_rows()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    name = table_files.save_tables(objective, Path(checkpoints), 7, World(rank, size, torch.device("cpu")))
    assert name is not None
    return name


def load_on_a_rank(folder: str) -> list[list[float]]:
    _make_large()
    objective = Remembering()
    table_files.load_tables(objective, Path(folder))
    return torch.cat((objective.first.whole(), objective.inner.second.whole()), dim=1).tolist()


EXPECTED = [[float(n), -float(n), n + 0.5] for n in range(ROWS)]


@pytest.mark.parametrize("saved_on", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(saved_on: int, tmp_path: Path) -> None:
    names = run_on_ranks(save_on_a_rank, saved_on, str(tmp_path))
    assert len(set(names)) == 1
    folder = tmp_path / names[0]
    assert all(path.stat().st_size < 3000 for path in folder.iterdir())
    assert len(list(folder.glob("first.*.pt"))) >= 5
    for loaded_on in (1, 2, 4):
        for seen in run_on_ranks(load_on_a_rank, loaded_on, str(folder)):
            assert seen == EXPECTED


ALONE = World(0, 1, torch.device("cpu"))


def _saved(checkpoints: Path, step: int, *users: str) -> str:
    """Tables, and checkpoints that name them."""
    objective = Remembering()
    objective.set_rows()
    name = table_files.save_tables(objective, checkpoints, step, ALONE)
    assert name is not None
    for user in users:
        write_atomically(checkpoints / user, {"epoch": 1, "tables": name, "weights": torch.zeros(100)})
    return name


def test_nothing_is_written_without_large_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "STATE_DICT_LIMIT", 10**9)
    assert table_files.save_tables(Remembering(), tmp_path, 1, ALONE) is None
    assert table_files.save_tables(Objective(), tmp_path, 1, ALONE) is None
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_is_never_written_twice_to_one_place(tmp_path: Path) -> None:
    assert _saved(tmp_path, 5) != _saved(tmp_path, 5)


def _folders(checkpoints: Path) -> set[str]:
    return {path.name for path in checkpoints.glob("tables-*")}


def test_a_folder_goes_with_the_last_checkpoint_that_names_it(tmp_path: Path) -> None:
    first = _saved(tmp_path, 5, "epoch_1.pt", "epoch_latest.pt")
    second = _saved(tmp_path, 10, "epoch_2.pt", "epoch_latest.pt")
    table_files.remove_unused(tmp_path)
    assert _folders(tmp_path) == {first, second}
    (tmp_path / "epoch_1.pt").rename(tmp_path / "best.pt")
    table_files.remove_unused(tmp_path)
    assert _folders(tmp_path) == {first, second}
    (tmp_path / "best.pt").unlink()
    table_files.remove_unused(tmp_path)
    assert _folders(tmp_path) == {second}


def test_a_folder_that_no_checkpoint_was_written_for_is_a_leftover(tmp_path: Path) -> None:
    _saved(tmp_path, 5)
    kept = _saved(tmp_path, 10, "epoch_2.pt")
    write_atomically(tmp_path / "foreign.pt", torch.zeros(3))
    table_files.remove_unused(tmp_path)
    assert _folders(tmp_path) == {kept}


def test_nothing_is_removed_where_a_checkpoint_cannot_be_read(tmp_path: Path) -> None:
    left = {_saved(tmp_path, 5), _saved(tmp_path, 10, "epoch_2.pt")}
    (tmp_path / "epoch_3.pt").write_bytes((tmp_path / "epoch_2.pt").read_bytes()[:200])
    table_files.remove_unused(tmp_path)
    assert _folders(tmp_path) == left


@pytest.mark.parametrize("missing", ["first", "middle", "last", "all"])
def test_missing_parts_are_noticed(missing: str, tmp_path: Path) -> None:
    folder = tmp_path / _saved(tmp_path, 5)
    parts = sorted(folder.glob("first.*.pt"))
    for path in {"first": parts[:1], "middle": parts[2:3], "last": parts[-1:], "all": parts}[missing]:
        path.unlink()
    with pytest.raises(UserError, match=rf"--resume needs the per-sample tables in .*of {ROWS}"):
        table_files.load_tables(Remembering(), folder)


def test_a_broken_part_is_named(tmp_path: Path) -> None:
    folder = tmp_path / _saved(tmp_path, 5)
    broken = sorted(folder.glob("first.*.pt"))[1]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=broken.name):
        table_files.load_tables(Remembering(), folder)


def test_a_failed_part_fails_the_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_files, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        table_files.save_tables(Remembering(), tmp_path, 1, ALONE)
    monkeypatch.undo()
    table_files.remove_unused(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_tables_of_another_size_do_not_fit(rows: int, tmp_path: Path) -> None:
    folder = tmp_path / _saved(tmp_path, 5)
    with pytest.raises(UserError, match=f"end at row {ROWS} of {rows}"):
        table_files.load_tables(Remembering(rows), folder)
