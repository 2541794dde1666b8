"""Files that are whole or not there, whatever fails or ends while they are written."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training import atomic_files
from training.atomic_files import (
    link_atomically,
    read_sidecar,
    replacing,
    sidecar_of,
    temporary_of,
    verify,
    write_atomically,
)
from training.checkpoint import remove_leftovers

OLD, NEW = {"epoch": 1, "w": torch.zeros(50)}, {"epoch": 2, "w": torch.ones(70)}


class Died(BaseException):
    """What ends a process."""


class Machine:
    """Counts what is asked of the system; the call numbered `fatal` fails, or is the last thing that happens."""

    def __init__(self, fatal: int, dies: bool) -> None:
        self.fatal, self.dies = fatal, dies
        self.calls, self.dead = 0, False

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function on this machine."""

        def on_this_machine(*args: Any, **named: Any) -> Any:
            if self.dead:
                raise Died
            self.calls += 1
            if self.calls - 1 == self.fatal:
                self.dead = self.dies
                raise Died if self.dies else OSError(28, "No space left on device")
            return function(*args, **named)

        return on_this_machine

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let the module under test run on it."""
        for name in ("open", "fsync", "replace", "unlink", "link"):
            patch.setattr(os, name, self.call(getattr(os, name)))
        patch.setattr(atomic_files, "open", self.call(self._open), raising=False)

    def _open(self, path: Path, mode: str) -> Any:
        file = builtins.open(path, mode, buffering=0)  # noqa: SIM115  (the caller closes it)
        return FileOnMachine(file, self) if "w" in mode else file


class FileOnMachine:
    """A file whose writing can fail."""

    def __init__(self, file: Any, machine: Machine) -> None:
        self.file = file
        self.write = machine.call(file.write)
        self.flush = file.flush
        self.fileno = file.fileno

    def __enter__(self) -> FileOnMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _write_old(path: Path) -> None:
    write_atomically(path, OLD)


def _write_old_without_sidecar(path: Path) -> None:
    torch.save(OLD, path)


def _write_nothing(path: Path) -> None:
    pass


def _write_new(path: Path) -> None:
    write_atomically(path, NEW, {"epoch": 2})


def _link_new(path: Path) -> None:
    source = path.with_name("epoch_2.pt")
    record = read_sidecar(source)
    assert record is not None
    link_atomically(source, path, record)


def _found(path: Path) -> int | None:
    """The epoch of the file that is there, if one is; it is whole."""
    if not path.exists():
        return None
    assert verify(path) is None
    return int(torch.load(path, weights_only=True)["epoch"])


@pytest.mark.parametrize("dies", [False, True], ids=["fails", "dies"])
@pytest.mark.parametrize("before", [_write_nothing, _write_old, _write_old_without_sidecar])
@pytest.mark.parametrize("action", [_write_new, _link_new])
def test_every_point_of_failure_leaves_the_old_or_the_new_file(
    action: Callable[[Path], None],
    before: Callable[[Path], None],
    dies: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()
    for fatal in range(200):
        folder = tmp_path / str(fatal)
        folder.mkdir()
        path = folder / "epoch_latest.pt"
        write_atomically(folder / "epoch_2.pt", NEW, {"epoch": 2})
        before(path)
        old = _found(path)
        machine = Machine(fatal, dies)
        with monkeypatch.context() as patch:
            machine.install(patch)
            try:
                action(path)
                finished = machine.calls <= fatal
            except (Died, OSError, RuntimeError):
                finished = False
        seen.add(_found(path))
        assert _found(path) in (old, 2)
        if not dies:
            assert list(folder.glob(".*")) == []
        remove_leftovers(folder)
        assert {p.name for p in folder.iterdir()} <= {
            name + end for name in ("epoch_2.pt", "epoch_latest.pt") for end in ("", ".json")
        }
        action(path)
        assert _found(path) == 2
        assert read_sidecar(path)["epoch"] == 2  # type: ignore[index]
        if finished:
            break
    assert finished
    # More than one call deep: names of the points would tie the test to the code.
    assert fatal > 8
    assert seen == {old, 2}


def test_sidecar_says_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "epoch_3.pt"
    record = write_atomically(path, NEW, {"epoch": 3, "step": 40})
    content = path.read_bytes()
    assert record["bytes"] == len(content)
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert (record["epoch"], record["step"]) == (3, 40)
    assert json.loads((tmp_path / "epoch_3.pt.json").read_text()) == record == read_sidecar(path)
    assert abs(record["written_ns"] - path.stat().st_mtime_ns) < 60e9
    assert list(tmp_path.glob("*.pt")) == [path]


def test_large_tensors_are_written_as_torch_writes_them(tmp_path: Path) -> None:
    content = {"a": torch.randn(300_000), "b": [torch.arange(5), None], "c": "text"}
    write_atomically(tmp_path / "a.pt", content)
    torch.save(content, tmp_path / "b.pt")
    assert (tmp_path / "a.pt").stat().st_size == pytest.approx((tmp_path / "b.pt").stat().st_size, abs=2000)
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["a"], content["a"])


@pytest.mark.parametrize("failing_write", [1, 2, 5, 9])
def test_what_torch_makes_of_a_full_disk_is_a_full_disk(
    failing_write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(failing_write, dies=False)
    with monkeypatch.context() as patch:
        machine.install(patch)
        with pytest.raises(OSError, match="No space left") as failure:
            write_atomically(tmp_path / "epoch_1.pt", NEW)
    assert failure.value.errno == 28
    assert list(tmp_path.iterdir()) == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(70).numpy().tobytes()) + 11] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "with_sidecar", "without"),
    [
        (_cut, r"it is [\d,]+ bytes long, [\d,]+ were written", "cannot be read"),
        (_flip, "its checksum differs", "its part .*data/0 is damaged"),
        (_empty, "it is 0 bytes long", "cannot be read"),
        (_remove, r"cannot be read \(No such file", "cannot be read"),
    ],
)
def test_damage_is_found_with_and_without_a_sidecar(
    damage: Callable[[Path], None], with_sidecar: str, without: str, tmp_path: Path
) -> None:
    path = tmp_path / "epoch_1.pt"
    write_atomically(path, NEW)
    assert verify(path) is None
    damage(path)
    assert re.search(with_sidecar, verify(path) or "")
    sidecar_of(path).unlink()
    assert re.search(without, verify(path) or "")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"bytes": "3", "sha256": "x"}', '{"bytes": 3}'])
def test_a_sidecar_that_says_nothing_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pt"
    write_atomically(path, NEW)
    sidecar_of(path).write_text(text)
    assert read_sidecar(path) is None
    assert verify(path) is None


def test_a_file_of_an_old_torch_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pt"
    torch.save(NEW, path, _use_new_zipfile_serialization=False)
    assert verify(path) is None
    path.write_bytes(path.read_bytes()[:-50])
    assert "cannot be read" in str(verify(path))


def test_link_is_the_same_file_and_copy_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, second, third = (tmp_path / f"epoch_{name}.pt" for name in ("1", "latest", "3"))
    record = write_atomically(source, NEW)
    for _ in range(2):  # the second time a link to the same file is there already
        link_atomically(source, second, record)
        assert second.samefile(source)
        assert list(tmp_path.glob(".*")) == []

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    link_atomically(source, third, record)
    assert not third.samefile(source)
    assert third.read_bytes() == source.read_bytes()
    assert verify(second) is verify(third) is None


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise Died

    with pytest.raises(Died):
        write_half()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert temporary_of(path).exists()
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pt"]
    assert path.read_bytes() == b"new"
