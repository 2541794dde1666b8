"""A copy of the run elsewhere: complete, current, never the reason why a run ends, and good to go on from."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from training import remote_sync
from training.atomic_files import read_sidecar, sidecar_of, verify, write_atomically
from training.checkpoint import newest_checkpoint
from training.checkpoint_writer import CheckpointWriter
from training.errors import UserError
from training.remote_files import Remote
from training.remote_sync import Mirror, RemoteSync, fetch_newest
from training.run_folder import RunFolder


class Trouble(MemoryFileSystem):
    """A file system with troubles of its own; `log` has what was written and removed, in order."""

    protocol = "trouble"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    failing = 0
    cannot_copy = False
    only = ""
    log: list[str] = []  # noqa: RUF012
    hold = threading.Event()

    def put_file(self, lpath: Any, rpath: Any, *args: Any, **named: Any) -> None:
        Trouble.hold.wait(60)
        if Trouble.only in rpath and Trouble.failing > 0:
            Trouble.failing -= 1
            raise RuntimeError("503\n  Slow Down")
        super().put_file(lpath, rpath, *args, **named)
        Trouble.log.append(rpath.rpartition("/run/")[2])

    def pipe_file(self, path: str, value: bytes, *args: Any, **named: Any) -> None:
        super().pipe_file(path, value, *args, **named)
        Trouble.log.append(path.rpartition("/run/")[2])

    def cp_file(self, path1: str, path2: str, **named: Any) -> None:
        if Trouble.cannot_copy:
            raise NotImplementedError
        super().cp_file(path1, path2, **named)
        Trouble.log.append(f"copy {path1.rpartition('/')[2]}")

    def rm(self, path: Any, *args: Any, **named: Any) -> None:
        super().rm(path, *args, **named)
        Trouble.log.append(f"rm {path.rpartition('/run/')[2]}")


class Mortal(MemoryFileSystem):
    """A file system whose client is cut off after `left` changes, in the middle of the next one."""

    protocol = "mortal"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    left = 10**9

    def _change(self, path: str, content: bytes) -> None:
        Mortal.left -= 1
        if Mortal.left == -1 and content:
            super().pipe_file(path, content[: len(content) // 2])
        if Mortal.left < 0:
            raise ConnectionError("cut off")

    def put_file(self, lpath: Any, rpath: Any, *args: Any, **named: Any) -> None:
        self._change(rpath, Path(lpath).read_bytes())
        super().put_file(lpath, rpath, *args, **named)

    def pipe_file(self, path: str, value: bytes, *args: Any, **named: Any) -> None:
        self._change(path, value)
        super().pipe_file(path, value, *args, **named)

    def cp_file(self, path1: str, path2: str, **named: Any) -> None:
        self._change(path2, self.cat_file(path1))
        super().cp_file(path1, path2, **named)

    def rm(self, path: Any, *args: Any, **named: Any) -> None:
        self._change(path, b"")
        super().rm(path, *args, **named)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("trouble", Trouble, clobber=True)
    fsspec.register_implementation("mortal", Mortal, clobber=True)
    monkeypatch.setattr(remote_sync, "FIRST_PAUSE_S", 0.01)
    Trouble.failing, Trouble.only, Trouble.cannot_copy = 0, "", False
    Mortal.left = 10**9
    Trouble.log.clear()
    Trouble.hold.set()
    for kind in (MemoryFileSystem, Trouble, Mortal):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    yield
    Trouble.hold.set()


@pytest.fixture(params=["file", "memory", "trouble"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/elsewhere/runs" if request.param == "file" else f"{request.param}://bucket/runs"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(str(tmp_path / "logs"), "run")
    made.create()
    made.write_params(Namespace(lr=0.1))
    (made.path / "out.log").write_text("begins\n")
    made.metrics.write_text('{"step": 1}\n')
    return made


def _write(folder: RunFolder, name: str, value: float = 1.0, tables: str | None = None) -> Path:
    content: dict[str, Any] = {"epoch": 1, "w": torch.full((500,), value)}
    if tables is not None:
        content |= {"tables": tables, "table_rows": {"table": 3}}
        part = folder.checkpoints / tables / "table.000000000000-000000000002.pt"
        part.parent.mkdir()
        write_atomically(part, torch.full((3, 1), value))
    write_atomically(folder.checkpoints / name, content)
    return folder.checkpoints / name


def _there(url: str) -> set[str]:
    return set(Remote(url, "run").find())


def _pair(name: str) -> set[str]:
    return {f"checkpoints/{name}", f"checkpoints/{name}.json"}


SMALL = {"out.log", "params.txt", "metrics.jsonl"}


def _until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_everything_arrives_and_comes_back(url: str, folder: RunFolder, tmp_path: Path) -> None:
    (folder.path / "model_configs").mkdir()
    (folder.path / "model_configs" / "own.json").write_text("{}")
    (folder.path / "profile.json").write_text("large")
    sync = RemoteSync(url, folder)
    path = _write(folder, "epoch_1.pt", tables="tables-5-ab")
    sync.saved([path], [])
    assert sync.finish(30)
    assert sync.failures == 0
    part = "checkpoints/tables-5-ab/table.000000000000-000000000002.pt"
    assert _there(url) == {*SMALL, "model_configs/own.json", *_pair("epoch_1.pt"), part, f"{part}.json"}

    other = RunFolder(str(tmp_path / "other machine"), "run")
    other.create()
    fetched = fetch_newest(url, other)
    assert fetched == other.checkpoints / "epoch_1.pt"
    assert newest_checkpoint(other.checkpoints) == fetched
    assert fetched.read_bytes() == path.read_bytes()
    assert read_sidecar(fetched) == read_sidecar(path)
    assert torch.load(other.path / part, weights_only=True).tolist() == [[1.0]] * 3
    assert other.metrics.read_text() == '{"step": 1}\n'
    assert (other.model_configs / "own.json").read_text() == "{}"
    assert list(other.checkpoints.glob(".*")) == []


def test_the_sidecar_comes_last_and_the_tables_first(folder: RunFolder) -> None:
    mirror = Mirror(Remote("trouble://bucket/runs", "run"), folder.path)
    path = _write(folder, "epoch_latest.pt", tables="tables-5-ab")
    part = "checkpoints/tables-5-ab/table.000000000000-000000000002.pt"
    expected = [part, f"{part}.json", *sorted(_pair("epoch_latest.pt"))]
    mirror.send_checkpoint(path)
    assert Trouble.log == expected
    Trouble.log.clear()
    _write(folder, "epoch_latest.pt", 2.0)
    mirror.send_checkpoint(path)
    # The old sidecar never stands beside the new file, and the old file stays until the new one is whole.
    assert Trouble.log == [
        *sorted(_pair("epoch_latest.pt.new")),
        *("rm checkpoints/epoch_latest.pt.json", "copy epoch_latest.pt.new", "checkpoints/epoch_latest.pt.json"),
        *(f"rm {place}" for place in sorted(_pair("epoch_latest.pt.new"), reverse=True)),
    ]


def test_only_what_has_changed_is_sent_again(folder: RunFolder) -> None:
    url = "trouble://bucket/runs"
    _write(folder, "epoch_1.pt", tables="tables-1-aa")
    first = RemoteSync(url, folder)
    assert first.finish(30)
    assert len(Trouble.log) == 7
    Trouble.log.clear()
    # A new start knows by the sidecars what is there.
    second = RemoteSync(url, folder)
    time.sleep(0.05)
    assert Trouble.log == []
    second.start()
    _until(lambda: len(Trouble.log) == 3)
    assert set(Trouble.log) == SMALL
    Trouble.log.clear()
    with folder.metrics.open("a") as file:
        file.write('{"step": 2}\n')
    path = _write(folder, "epoch_2.pt")
    second.saved([path], [])
    assert second.finish(30)
    assert Trouble.log == [*sorted(_pair("epoch_2.pt")), "metrics.jsonl"]


def _value(checkpoint: Path | None) -> float:
    assert checkpoint is not None
    return torch.load(checkpoint, weights_only=True)["w"][0].item()


@pytest.mark.parametrize("first", range(10))
def test_wherever_machines_die_a_whole_one_is_there(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk here stays
    url = "mortal://bucket/runs"
    for second in range(14):
        Remote(url, "run").remove("")
        folders = [RunFolder(str(tmp_path / f"{second} {machine}"), "run") for machine in range(3)]
        values = [1.0]
        for folder, left in zip(folders, (10**9, first, second), strict=True):
            folder.create()
            mirror = Mirror(Remote(url, "run"), folder.path)
            if folder is not folders[0]:
                values.append(_value(fetch_newest(url, folder)))
                with contextlib.suppress(ConnectionError):
                    Mortal.left = left
                    mirror.send_checkpoint(folder.checkpoints / "epoch_latest.pt")
            with contextlib.suppress(ConnectionError):
                mirror.send_checkpoint(_write(folder, "epoch_latest.pt", len(values)))
            Mortal.left = 10**9
        last = RunFolder(str(tmp_path / f"{second} last"), "run")
        last.create()
        values.append(_value(fetch_newest(url, last)))
        assert values == sorted(values), f"the second died after {first} changes, the third after {second}"
        Mirror(Remote(url, "run"), last.path).send_checkpoint(_write(last, "epoch_latest.pt", 9.0))
        assert _there(url) == _pair("epoch_latest.pt"), "nothing else is left behind"
    assert values[-1] == 3.0, "the third has changed all that it had to"


def test_one_without_a_sidecar_does_not_replace_a_whole_one(folder: RunFolder) -> None:
    remote = Remote("memory://bucket/runs", "run")
    mirror = Mirror(remote, folder.path)
    path = _write(folder, "epoch_latest.pt", 1.0)
    mirror.send_checkpoint(path)
    before = remote.read("checkpoints/epoch_latest.pt")
    _write(folder, "epoch_latest.pt", 2.0)
    record = sidecar_of(path).read_bytes()
    sidecar_of(path).unlink()
    mirror.send_checkpoint(path)
    assert remote.read("checkpoints/epoch_latest.pt") == before
    sidecar_of(path).write_bytes(record)
    mirror.send_checkpoint(path)
    assert remote.read("checkpoints/epoch_latest.pt.json") == record
    assert remote.read("checkpoints/epoch_latest.pt") == path.read_bytes()


@pytest.mark.parametrize("cannot_copy", [False, True])
def test_a_second_name_is_copied_there(cannot_copy: bool, folder: RunFolder) -> None:
    Trouble.cannot_copy = cannot_copy
    url = "trouble://bucket/runs"
    sync = RemoteSync(url, folder)
    for epoch in (1, 2):
        CheckpointWriter(folder.checkpoints, on_saved=sync.saved).save(
            [f"epoch_{epoch}.pt", "epoch_latest.pt"], {"w": torch.full((9,), float(epoch))}, {}
        )
        _until(lambda: Trouble.log.count("checkpoints/epoch_latest.pt.json") >= epoch)  # noqa: B023
    assert sync.finish(30)
    assert Trouble.log.count("copy epoch_2.pt") == (0 if cannot_copy else 1)
    remote = Remote(url, "run")
    assert remote.read("checkpoints/epoch_latest.pt") == (folder.checkpoints / "epoch_2.pt").read_bytes()
    assert json.loads(remote.read("checkpoints/epoch_latest.pt.json") or b"") == read_sidecar(
        folder.checkpoints / "epoch_2.pt"
    )


def test_what_the_writer_removes_goes_there_and_nothing_else(url: str, folder: RunFolder, tmp_path: Path) -> None:
    # Removed by the writer and never sent: it is unreadable. The one there is somebody else's.
    torch.save({"epoch": 7}, tmp_path / "foreign.pt")
    Remote(url, "run").send(tmp_path / "foreign.pt", "checkpoints/epoch_7.pt")
    (folder.checkpoints / "epoch_7.pt").write_bytes(b"damaged")
    os.utime(folder.checkpoints / "epoch_7.pt", (1, 1))
    sync = RemoteSync(url, folder)
    sync.start()
    writer = CheckpointWriter(folder.checkpoints, keep_last=2, on_saved=sync.saved)
    for epoch in range(1, 5):
        tables = f"tables-{epoch}-aa"
        path = _write(folder, f"epoch_{epoch}.pt", epoch, tables)
        writer.save([path.name], torch.load(path, weights_only=True), {})
        _until(lambda: _pair(f"epoch_{epoch}.pt") <= _there(url))  # noqa: B023
    assert sync.finish(30)
    names = {place for place in _there(url) if place.startswith("checkpoints/") and "tables" not in place}
    assert names == {*_pair("epoch_3.pt"), *_pair("epoch_4.pt"), "checkpoints/epoch_7.pt"}
    assert {place.split("/")[1] for place in _there(url) if "tables" in place} == {"tables-3-aa", "tables-4-aa"}
    assert newest_checkpoint(folder.checkpoints) == folder.checkpoints / "epoch_4.pt"


def test_what_somebody_removes_here_stays_there(url: str, folder: RunFolder) -> None:
    path = _write(folder, "epoch_1.pt")
    first = RemoteSync(url, folder)
    assert first.finish(30)
    second = RemoteSync(url, folder)
    path.unlink()
    sidecar_of(path).unlink()
    second.saved([_write(folder, "epoch_2.pt")], [])
    assert second.finish(30)
    assert _pair("epoch_1.pt") | _pair("epoch_2.pt") <= _there(url)


def test_what_an_earlier_start_sent_is_removed_too(folder: RunFolder) -> None:
    mirror = Mirror(Remote("memory://bucket/runs", "run"), folder.path)
    path = _write(folder, "epoch_1.pt", tables="tables-1-aa")
    mirror.send_checkpoint(path)
    again = Mirror(Remote("memory://bucket/runs", "run"), folder.path)
    again.send_checkpoint(path)
    again.remove(path)
    assert _pair("epoch_1.pt") <= _there("memory://bucket/runs")  # it is here, still or again
    for file in [*path.parent.glob("tables-1-aa/*"), path, sidecar_of(path)]:
        file.unlink()
    (folder.checkpoints / "tables-1-aa").rmdir()
    again.remove(path)
    again.remove(folder.checkpoints / "tables-1-aa")
    assert _there("memory://bucket/runs") == set()


def test_failures_are_tried_again_and_cost_nothing(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    Trouble.failing = 5
    sync = RemoteSync("trouble://bucket/runs", folder)
    sync.saved([_write(folder, "epoch_1.pt")], [])
    _until(lambda: _pair("epoch_1.pt") <= _there("trouble://bucket/runs"))
    assert sync.finish(30)
    assert 1 <= sync.failures <= 5
    assert "503 Slow Down; next attempt in" in caplog.text
    assert "trouble://bucket/runs" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    assert _there("trouble://bucket/runs") > SMALL


def test_nothing_is_removed_before_what_replaces_it_has_arrived(folder: RunFolder) -> None:
    url = "trouble://bucket/runs"
    sync = RemoteSync(url, folder)
    writer = CheckpointWriter(folder.checkpoints, keep_last=1, on_saved=sync.saved)
    writer.save(["epoch_1.pt"], {"w": torch.zeros(3)}, {})
    _until(lambda: _pair("epoch_1.pt") <= _there(url))
    Trouble.only, Trouble.failing = "epoch_2", 3
    writer.save(["epoch_2.pt"], {"w": torch.ones(3)}, {})
    assert sync.finish(30)
    assert sync.failures == 3
    assert Trouble.log.index("rm checkpoints/epoch_1.pt") > Trouble.log.index("checkpoints/epoch_2.pt.json")
    assert _pair("epoch_1.pt") & _there(url) == set()


def test_one_file_that_fails_does_not_keep_the_others_back(folder: RunFolder) -> None:
    Trouble.only, Trouble.failing = "epoch_2.pt", 10**9
    _write(folder, "epoch_1.pt", 1.0)
    _write(folder, "epoch_2.pt", 2.0)
    sync = RemoteSync("trouble://bucket/runs", folder)
    sync.start()
    _until(lambda: _there("trouble://bucket/runs") == {*SMALL, *_pair("epoch_1.pt")})
    assert not sync.finish(0.1)
    Trouble.failing = 0
    assert sync.finish(30)


def test_the_end_of_a_run_waits_no_longer_than_it_is_told(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    Trouble.hold.clear()
    sync = RemoteSync("trouble://bucket/runs", folder)
    begin = time.monotonic()
    assert not sync.finish(0.2)
    assert 0.2 <= time.monotonic() - begin < 5
    assert "not everything was sent within 0 s" in caplog.text
    Trouble.hold.set()
    assert sync.finish(30)


def test_a_file_replaced_while_it_is_sent_gets_no_sidecar(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote("memory://bucket/runs", "run")
    mirror = Mirror(remote, folder.path)
    path = _write(folder, "epoch_latest.pt", 1.0)
    send = remote.send

    def replace_and_send(source: Path, place: str) -> None:
        _write(folder, "epoch_latest.pt", 2.0)
        send(source, place)

    monkeypatch.setattr(remote, "send", replace_and_send)
    with pytest.raises(OSError, match="replaced"):
        mirror.send_checkpoint(path)
    assert remote.find() == ["checkpoints/epoch_latest.pt"]
    monkeypatch.undo()
    mirror.send_checkpoint(path)
    assert set(remote.find()) == _pair("epoch_latest.pt")
    assert json.loads(remote.read("checkpoints/epoch_latest.pt.json") or b"") == read_sidecar(path)


def test_a_damaged_file_here_is_not_sent(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    (folder.checkpoints / "epoch_1.pt").write_bytes(b"damaged")
    _write(folder, "epoch_2.pt")
    sync = RemoteSync("memory://bucket/runs", folder)
    assert sync.finish(30)
    assert sync.failures == 0
    assert [message for message in caplog.messages if "epoch_1.pt is not sent" in message]
    assert _there("memory://bucket/runs") == {*SMALL, *_pair("epoch_2.pt")}


def test_a_log_that_is_no_continuation_does_not_replace_what_is_there(url: str, folder: RunFolder) -> None:
    assert RemoteSync(url, folder).finish(30)
    with (folder.path / "out.log").open("a") as file:
        file.write("goes on\n")
    folder.metrics.write_text('{"step": 9}\n')
    assert RemoteSync(url, folder).finish(30)
    remote = Remote(url, "run")
    assert remote.read("out.log") == b"begins\ngoes on\n"
    assert remote.read("metrics.jsonl") == b'{"step": 9}\n'
    (kept,) = _there(url) - SMALL
    assert kept.startswith("metrics.jsonl.before-")
    assert remote.read(kept) == b'{"step": 1}\n'


def _send(url: str, folder: RunFolder, *names: str) -> None:
    for number, name in enumerate(names):
        _write(folder, name, number)
    assert RemoteSync(url, folder).finish(30)


def test_the_newest_by_time_of_writing_is_fetched(url: str, folder: RunFolder, tmp_path: Path) -> None:
    _send(url, folder, "epoch_9.pt", "iter_80.pt", "epoch_10.pt", "epoch_2.pt")
    other = RunFolder(str(tmp_path / "other"), "run")
    other.create()
    assert fetch_newest(url, other) == other.checkpoints / "epoch_2.pt"
    assert verify(other.checkpoints / "epoch_2.pt") is None


def test_what_is_not_whole_there_is_passed_over(
    url: str, folder: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _send(url, folder, *(f"epoch_{epoch}.pt" for epoch in range(1, 5)))
    _write(folder, "epoch_5.pt", tables="tables-5-aa")
    assert RemoteSync(url, folder).finish(30)
    remote = Remote(url, "run")
    remote.remove("checkpoints/tables-5-aa/table.000000000000-000000000002.pt")
    remote.remove("checkpoints/epoch_4.pt.json")  # the sending ended here
    remote.write("checkpoints/epoch_3.pt", (remote.read("checkpoints/epoch_3.pt") or b"")[:-3] + b"abc")
    remote.write("checkpoints/epoch_6.pt.json", b"{}")
    other = RunFolder(str(tmp_path / "other"), "run")
    other.create()
    assert fetch_newest(url, other) == other.checkpoints / "epoch_2.pt"
    assert [message.split("/")[-1] for message in caplog.messages if "checksum" in message] == [
        "epoch_3.pt: its checksum differs from that of what was written"
    ]
    assert any("epoch_5.pt: its per-sample tables" in message for message in caplog.messages)
    assert {path.name for path in other.checkpoints.glob("*.pt")} == {"epoch_2.pt"}


def test_there_may_be_nothing_to_fetch(url: str, folder: RunFolder) -> None:
    assert fetch_newest(url, folder) is None
    assert (folder.path / "out.log").read_text() == "begins\n"


@pytest.mark.parametrize("damage", ["no sidecar", "damaged"])
def test_a_copy_without_a_whole_checkpoint_is_not_written_over(
    damage: str, url: str, folder: RunFolder, tmp_path: Path
) -> None:
    _send(url, folder, "epoch_latest.pt")
    remote = Remote(url, "run")
    if damage == "no sidecar":
        remote.remove("checkpoints/epoch_latest.pt.json")
    else:
        remote.write("checkpoints/epoch_latest.pt", b"damaged")
    other = RunFolder(str(tmp_path / "other"), "run")
    other.create()
    with pytest.raises(
        UserError, match=r"no checkpoint in .*/checkpoints is whole .*remove them to start anew"
    ) as said:
        fetch_newest(url, other)
    assert f"--remote-sync {url}: " in str(said.value)
    assert ("no readable sidecar" if damage == "no sidecar" else "its checksum differs") in str(said.value)
    # Not needed where there is one here.
    assert fetch_newest(url, folder) is None


def _write_older(path: Path, value: float, written_ns: int) -> None:
    record = write_atomically(path, {"w": torch.full((500,), value)}) | {"written_ns": written_ns}
    sidecar_of(path).write_text(json.dumps(record))
    os.utime(path, ns=(written_ns, written_ns))


@pytest.mark.parametrize("name", ["epoch_latest.pt", "iter_1000.pt"])
def test_a_newer_one_there_is_taken(
    name: str, url: str, folder: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder.path / "out.log").write_text("begins\ngoes on elsewhere\n")
    folder.metrics.write_text('{"step": 5000}\n')
    _send(url, folder, "epoch_latest.pt")
    stale = RunFolder(str(tmp_path / "other"), "run")
    stale.create()
    _write_older(stale.checkpoints / name, 7.0, time.time_ns() - 3600 * 10**9)
    (stale.path / "out.log").write_text("begins\n")
    stale.metrics.write_text('{"step": 1001}\n')
    with caplog.at_level(logging.INFO):
        fetched = fetch_newest(url, stale)
    assert fetched == stale.checkpoints / "epoch_latest.pt" == newest_checkpoint(stale.checkpoints)
    assert _value(fetched) == 0.0
    assert f"{name} was written 2" in caplog.text
    assert f"older than epoch_latest.pt, fetched from {url}" in caplog.text
    # The log of what has been fetched; lines that only this folder has are not lost.
    assert (stale.path / "out.log").read_text() == "begins\ngoes on elsewhere\n"
    assert stale.metrics.read_text() == '{"step": 5000}\n'
    (aside,) = stale.path.glob("*.before-*")
    assert aside.read_text() == '{"step": 1001}\n'
    # From now on it is as new as the one there.
    assert fetch_newest(url, stale) is None


def test_an_older_one_there_is_not_taken(
    url: str, folder: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _send(url, folder, "epoch_1.pt")
    other = RunFolder(str(tmp_path / "other"), "run")
    other.create()
    path = _write(other, "epoch_latest.pt", 7.0)
    with caplog.at_level(logging.INFO):
        assert fetch_newest(url, other) is None
    assert f"there is none newer at {url}" in caplog.text
    assert newest_checkpoint(other.checkpoints) == path
    assert sorted(found.name for found in other.path.iterdir()) == ["checkpoints"]


def test_a_damaged_folder_is_rescued_by_the_copy(url: str, folder: RunFolder) -> None:
    _send(url, folder, "epoch_1.pt", "epoch_latest.pt")
    for path in folder.checkpoints.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    assert fetch_newest(url, folder) == folder.checkpoints / "epoch_latest.pt"
    assert newest_checkpoint(folder.checkpoints) == folder.checkpoints / "epoch_latest.pt"


@pytest.mark.parametrize("there", ["nothing", "no whole one"])
def test_a_damaged_folder_stays_a_mistake_without_a_whole_copy(there: str, url: str, folder: RunFolder) -> None:
    if there == "no whole one":
        _send(url, folder, "epoch_1.pt")
        Remote(url, "run").remove("checkpoints/epoch_1.pt.json")
    _write(folder, "epoch_1.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"no checkpoint in {folder.checkpoints} is whole"):
        fetch_newest(url, folder)


def test_files_that_are_here_are_not_fetched(folder: RunFolder, tmp_path: Path) -> None:
    _send("memory://bucket/runs", folder, "epoch_1.pt")
    (folder.path / "out.log").write_text("another")
    fetch_newest("memory://bucket/runs", folder)
    assert (folder.path / "out.log").read_text() == "another"


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3://bucket/runs", "pip install s3fs"),
        ("gs://bucket/runs", "pip install gcsfs"),
        ("nonsense://bucket/runs", "cannot be opened: .*nonsense"),
    ],
)
def test_a_place_that_nobody_can_open_is_a_mistake_of_the_user(
    url: str, remedy: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--remote-sync {url}.*{remedy}") as mistake:
        RemoteSync(url, folder)
    assert "\n" not in str(mistake.value)


def test_another_run_of_that_name_is_refused(url: str, folder: RunFolder) -> None:
    Remote(url, "run").check(None)
    assert RemoteSync(url, folder).finish(30)
    with pytest.raises(UserError, match=r"holds a run of this name already.*--resume latest"):
        Remote(url, "run").check(None)
    Remote(url, "run").check("latest")
    Remote(url, "another").check(None)
    assert _there(url) == SMALL


def test_a_place_that_cannot_be_written_to_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read and written to"):
        Remote(f"file://{tmp_path}/file/runs", "run").check(None)


def test_trouble_on_the_way_back_is_one_line(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("403\nForbidden")

    monkeypatch.setattr(MemoryFileSystem, "find", refuse)
    with pytest.raises(UserError, match="--remote-sync memory://bucket/runs: run cannot be fetched: 403 Forbidden"):
        fetch_newest("memory://bucket/runs", folder)


def test_finishing_is_logged(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _send("memory://bucket/runs", folder, "epoch_1.pt")
    assert "sent epoch_1.pt to memory://bucket/runs" in caplog.messages
