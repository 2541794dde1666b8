"""Tables in parts beside the checkpoint: written by some ranks, read by any number, never half, never lost."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from evaluation.sample_tables import load_tables
from neuclip.normalizers import ShardedTable, table
from neuclip.objectives import Objective
from ranks import run_on_ranks
from training import table_files
from training.atomic_files import sidecar_of, write_atomically
from training.checkpoint import newest_checkpoint
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
    load_tables(objective, Path(folder))
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
    with pytest.raises(UserError, match=rf"the per-sample tables in .*of {ROWS}"):
        load_tables(Remembering(), folder)


def test_a_broken_part_is_named(tmp_path: Path) -> None:
    folder = tmp_path / _saved(tmp_path, 5)
    broken = sorted(folder.glob("first.*.pt"))[1]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=broken.name):
        load_tables(Remembering(), folder)


def test_a_failed_part_fails_the_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_files, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        table_files.save_tables(Remembering(), tmp_path, 1, ALONE)
    monkeypatch.undo()
    table_files.remove_unused(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_failed_part_fails_the_saving_on_all_ranks(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in run_on_ranks(fail_on_a_rank, size, str(tmp_path / "file")):
        assert re.fullmatch(r"cannot save .*/tables-7-\w+: Not a directory.*", message), message


def fail_on_a_rank(checkpoints: str) -> str:
    _make_large()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        table_files.save_tables(Remembering(), Path(checkpoints), 7, World(rank, size, torch.device("cpu")))
    except OSError as error:
        return str(error)
    return "saved"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _cut_without_sidecar(path: Path) -> None:
    _cut(path)
    sidecar_of(path).unlink()


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _cut_without_sidecar])
@pytest.mark.parametrize("which", [0, 2, -1])
def test_a_checkpoint_without_all_of_its_tables_is_passed_over(
    which: int, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objective = Remembering()
    for step in (5, 10):
        name = table_files.save_tables(objective, tmp_path, step, ALONE)
        content = {"epoch": step, "tables": name, "table_rows": table_files.describe_tables(objective)}
        write_atomically(tmp_path / f"iter_{step}.pt", content)
        os.utime(tmp_path / f"iter_{step}.pt", (step, step))
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_10.pt"
    assert name is not None
    part = sorted((tmp_path / name).glob("first.*.pt"))[which]
    damage(part)
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_5.pt"
    assert "iter_10.pt" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize(("missing", "is_noticed"), [(0, True), (2, True), (-1, False)])
def test_a_checkpoint_that_does_not_say_how_many_rows_there_were(
    missing: int, is_noticed: bool, tmp_path: Path
) -> None:
    """One of an older version: what is missing at the end is noticed on loading only."""
    _saved(tmp_path, 5, "epoch_1.pt")
    (folder,) = table_files.table_folders(tmp_path)
    assert table_files.missing_parts(folder, None) is None
    sorted(folder.glob("first.*.pt"))[missing].unlink()
    assert (table_files.missing_parts(folder, None) is not None) == is_noticed
    assert "are not there" in str(table_files.missing_parts(tmp_path / "tables-6-0", None))


def test_folders_that_were_not_there_before_are_left_alone(tmp_path: Path) -> None:
    before = tmp_path / _saved(tmp_path, 5)
    later = tmp_path / _saved(tmp_path, 10)
    assert table_files.remove_unused(tmp_path, [before]) == [before]
    assert table_files.table_folders(tmp_path) == [later]
    assert table_files.remove_unused(tmp_path) == [later]


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_tables_of_another_size_do_not_fit(rows: int, tmp_path: Path) -> None:
    folder = tmp_path / _saved(tmp_path, 5)
    with pytest.raises(UserError, match=f"end at row {ROWS} of {rows}"):
        load_tables(Remembering(rows), folder)
