"""Saving: under several names, in the background, on full disks, and what goes afterwards."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training import checkpoint_writer
from training.atomic_files import read_sidecar, verify, write_atomically
from training.checkpoint import newest_checkpoint
from training.checkpoint_writer import CheckpointWriter
from training.host_copy import HostCopy

BOTH = pytest.mark.parametrize("in_background", [False, True], ids=["foreground", "background"])


def _content(value: float = 1.0, size: int = 1000, **more: Any) -> dict[str, Any]:
    return {"epoch": 1, "w": torch.full((size,), value), **more}


def _read(path: Path) -> dict[str, Any]:
    assert verify(path) is None
    return torch.load(path, weights_only=True)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".json")}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before it is set."""
    gate = threading.Event()

    def write(*args: Any) -> dict[str, Any]:
        assert gate.wait(60)
        return write_atomically(*args)

    monkeypatch.setattr(checkpoint_writer, "write_atomically", write)
    yield gate
    gate.set()


@BOTH
def test_one_file_with_all_names(in_background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []
    writer = CheckpointWriter(tmp_path, in_background=in_background, on_saved=lambda *what: told.append(what))
    names = ["epoch_1.pt", "epoch_latest.pt"]
    with caplog.at_level(logging.INFO):
        assert writer.save(names, _content(), {"epoch": 1, "step": 7}) is None
        assert writer.close() is None
    first, second = (tmp_path / name for name in names)
    assert first.samefile(second)
    assert torch.equal(_read(second)["w"], torch.ones(1000))
    for path in (first, second):
        record = read_sidecar(path)
        assert record is not None
        assert (record["epoch"], record["step"]) == (1, 7)
    assert told == [([first, second], [])]
    assert caplog.messages == [f"saved {first}", f"saved {second}"]
    assert not writer.busy


def test_what_is_written_in_the_background_does_not_see_training_go_on(tmp_path: Path, gate: threading.Event) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "data": {"read": [1, {"a": 2}]},
    }
    writer = CheckpointWriter(tmp_path, in_background=True)
    write_atomically(tmp_path / "expected.pt", content)
    writer.save(["iter_1.pt"], content, {})
    assert writer.busy
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
            for moment in optimizer.state[parameter].values():
                moment.fill_(9.0)
    content["data"]["read"].append(3)
    content["data"]["read"][1]["a"] = 4
    content["state_dict"].clear()
    assert not (tmp_path / "iter_1.pt").exists()
    gate.set()
    writer.close()
    found, expected = _read(tmp_path / "iter_1.pt"), _read(tmp_path / "expected.pt")
    assert found["data"] == {"read": [1, {"a": 2}]}
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, weight in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], weight)
    for number, moments in expected["optimizer"]["state"].items():
        for name, moment in moments.items():
            assert torch.equal(found["optimizer"]["state"][number][name], moment)


def test_the_next_save_waits_for_this_one(tmp_path: Path, gate: threading.Event) -> None:
    writer = CheckpointWriter(tmp_path, in_background=True)
    weight = torch.zeros(5)
    writer.save(["iter_1.pt"], {"w": weight}, {})
    weight.fill_(1.0)
    second = threading.Thread(target=writer.save, args=(["iter_2.pt"], {"w": weight}, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join()
    writer.close()
    assert _read(tmp_path / "iter_1.pt")["w"].tolist() == [0.0] * 5
    assert _read(tmp_path / "iter_2.pt")["w"].tolist() == [1.0] * 5


DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


@DEVICES
def test_host_copy_is_the_same_and_shares_nothing(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tied = torch.randn(4, 3, device=device)
    module_state = nn.BatchNorm1d(2).state_dict()
    content = {
        "a": tied,
        "b": [tied, (1, "x", None)],
        "turned": torch.randn(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last),
        "half": torch.ones(3, dtype=torch.bfloat16, device=device)[1:],
        "empty": torch.zeros(0, device=device),
        "other empty": torch.zeros(0, 2, device=device),
        "module": module_state,
        5: {"learnt": nn.Parameter(torch.ones(2, device=device))},
    }
    copied = HostCopy().take(content)
    assert copied.keys() == content.keys()
    assert copied["a"] is copied["b"][0]
    assert copied["b"][1] == (1, "x", None)
    assert type(copied["module"]) is OrderedDict
    assert copied["module"]._metadata == module_state._metadata
    assert copied["turned"].stride() == content["turned"].stride()
    assert copied["other empty"].shape == (0, 2)
    assert type(copied[5]["learnt"]) is torch.Tensor
    for name in ("a", "turned", "half"):
        assert torch.equal(copied[name], content[name].cpu())
        assert copied[name].dtype == content[name].dtype
        assert copied[name].is_pinned() == (device == "cuda")
        assert copied[name].device.type == "cpu"
        content[name].zero_()
        assert copied[name].count_nonzero() == copied[name].numel()
    assert len(copied["half"].untyped_storage()) == 4


@DEVICES
def test_host_memory_is_used_again(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    copier = HostCopy()
    content = {"a": torch.zeros(5, device=device), "b": torch.zeros(6, device=device)}
    places = {name: part.data_ptr() for name, part in copier.take(content).items()}
    content["a"] += 1
    copied = copier.take(content)
    assert {name: part.data_ptr() for name, part in copied.items()} == places
    assert copied["a"].tolist() == [1.0] * 5
    copied = copier.take({"a": torch.ones(7), "b": content["b"]})
    assert copied["a"].tolist() == [1.0] * 7
    assert copied["b"].data_ptr() == places["b"]


REASONS = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES)}


@BOTH
@pytest.mark.parametrize("number", REASONS, ids=errno.errorcode.get)
def test_a_place_that_cannot_be_written_to_costs_a_checkpoint_and_not_the_run(
    number: int, in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter(tmp_path, in_background=in_background)
    writer.save(["epoch_1.pt"], _content(1.0), {})
    writer.wait()

    def failing(content: Any, file: Any) -> None:
        raise OSError(number, REASONS[number])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        failure = writer.save(["epoch_2.pt", "epoch_latest.pt"], _content(2.0), {}) or writer.wait()
    assert failure is not None
    assert failure.startswith(f"cannot save {tmp_path / 'epoch_2.pt'}: {REASONS[number]}; the last whole checkpoint is")
    assert failure.endswith("epoch_1.pt")
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith(failure)
    assert "--strict-save" in line
    assert _names(tmp_path) == {"epoch_1.pt"}
    assert writer.wait() is None  # told once
    writer.save(["epoch_2.pt"], _content(2.0), {})
    assert writer.close() is None
    assert _read(tmp_path / "epoch_2.pt")["w"][0] == 2.0


@BOTH
def test_a_limit_of_the_system_is_met_half_way(in_background: bool, tmp_path: Path) -> None:
    """What the kernel says, through a file object, through torch."""
    writer = CheckpointWriter(tmp_path, in_background=in_background)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        failure = writer.save(["epoch_1.pt"], _content(size=100_000), {}) or writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failure is not None
    assert "File too large; the last whole checkpoint is none yet" in failure
    assert list(tmp_path.iterdir()) == []
    writer.close()


def test_the_last_whole_one_may_be_of_an_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "epoch_4.pt", _content())
    monkeypatch.setattr(checkpoint_writer, "write_atomically", _full)
    assert str(CheckpointWriter(tmp_path).save(["epoch_5.pt"], _content(), {})).endswith("epoch_4.pt")


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_second_name_that_fails_leaves_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "link_atomically", _full)
    writer = CheckpointWriter(tmp_path, keep_last=1)
    write_atomically(tmp_path / "epoch_1.pt", _content())
    failure = writer.save(["epoch_2.pt", "epoch_latest.pt"], _content(), {})
    assert failure is not None
    assert "epoch_latest.pt: No space" in failure
    assert failure.endswith("epoch_2.pt")
    assert _names(tmp_path) == {"epoch_1.pt", "epoch_2.pt"}  # nothing goes after a failure


@BOTH
def test_what_the_file_system_is_not_to_blame_for_is_raised(in_background: bool, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, in_background=in_background)

    def save() -> None:
        writer.save(["epoch_1.pt"], {"a": lambda: 1}, {})
        writer.wait()

    with pytest.raises(Exception, match="pickle"):
        save()
    assert list(tmp_path.iterdir()) == []
    assert writer.close() is None


def _write_at(folder: Path, seconds: int, *names: str) -> None:
    for name in names:
        write_atomically(folder / name, _content())
        os.utime(folder / name, (seconds, seconds))


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    removed: list[Path] = []
    writer = CheckpointWriter(tmp_path, keep_last=2, on_saved=lambda _, gone: removed.extend(gone))
    for epoch in range(1, 5):
        for step in (2 * epoch - 1, 2 * epoch):
            writer.save([f"iter_{step}.pt"], _content(), {})
        writer.save([f"epoch_{epoch}.pt", "epoch_latest.pt"], _content(), {})
    assert _names(tmp_path) == {"epoch_3.pt", "epoch_4.pt", "epoch_latest.pt", "iter_7.pt", "iter_8.pt"}
    assert len(list(tmp_path.glob("*.json"))) == 5
    assert [path.name for path in removed if path.name.startswith("epoch")] == ["epoch_1.pt", "epoch_2.pt"]
    assert len(removed) == 8
    assert newest_checkpoint(tmp_path) == tmp_path / "epoch_4.pt"


def test_after_going_back_the_ones_written_since_are_kept(tmp_path: Path) -> None:
    for epoch in range(1, 10):
        _write_at(tmp_path, 100 * epoch, f"epoch_{epoch}.pt")
    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.save(["epoch_4.pt"], _content(4.0), {})
    assert _names(tmp_path) == {"epoch_4.pt", "epoch_9.pt"}
    writer.save(["epoch_5.pt"], _content(5.0), {})
    assert _names(tmp_path) == {"epoch_4.pt", "epoch_5.pt"}
    assert _read(tmp_path / "epoch_4.pt")["w"][0] == 4.0


def test_what_has_just_been_written_stays_whatever_the_clock_says(tmp_path: Path) -> None:
    _write_at(tmp_path, 4_000_000_000, "epoch_1.pt", "epoch_2.pt")
    CheckpointWriter(tmp_path, keep_last=1, delete_previous=True).save(["epoch_1.pt"], _content(5.0), {})
    assert (tmp_path / "epoch_1.pt").exists()
    assert _read(tmp_path / "epoch_1.pt")["w"][0] == 5.0


def test_previous_epochs_go_and_nothing_else(tmp_path: Path) -> None:
    _write_at(tmp_path, 100, "epoch_1.pt", "epoch_2.pt", "epoch_9.pt", "epoch_latest.pt", "iter_3.pt", "best.pt")
    writer = CheckpointWriter(tmp_path, delete_previous=True)
    writer.save(["iter_5.pt"], _content(), {})
    writer.save(["epoch_latest.pt"], _content(), {})
    assert {"epoch_1.pt", "epoch_2.pt"} <= _names(tmp_path)
    writer.save(["epoch_3.pt"], _content(), {})
    others = {"epoch_9.pt", "epoch_latest.pt", "iter_3.pt", "iter_5.pt", "best.pt"}
    assert _names(tmp_path) == {"epoch_3.pt", *others}


def test_a_file_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _write_at(tmp_path, 100, "epoch_1.pt")
    removed: list[Path] = []

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint_writer, "remove", refuse)
    writer = CheckpointWriter(tmp_path, keep_last=1, on_saved=lambda _, gone: removed.extend(gone))
    assert writer.save(["epoch_2.pt"], _content(), {}) is None
    assert f"{tmp_path / 'epoch_1.pt'} cannot be removed: Permission denied" in caplog.text
    assert removed == []


def _make_tables(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    write_atomically(folder / name / "table.000000000000-000000000002.pt", torch.zeros(3, 1))
    return folder / name


def test_tables_go_with_their_checkpoint_and_those_on_their_way_stay(tmp_path: Path, gate: threading.Event) -> None:
    told: list[list[Path]] = []
    writer = CheckpointWriter(tmp_path, in_background=True, on_saved=lambda _, gone: told.append(gone))
    first = _make_tables(tmp_path, "tables-1-aa")
    gate.set()
    writer.save(["epoch_latest.pt"], _content(tables=first.name), {})
    writer.wait()
    gate.clear()
    second = _make_tables(tmp_path, "tables-2-bb")
    writer.save(["epoch_latest.pt"], _content(tables=second.name), {})
    third = _make_tables(tmp_path, "tables-3-cc")
    gate.set()
    writer.close()
    assert not first.exists()
    assert second.exists()
    assert third.exists()
    assert told == [[], [first]]


@pytest.mark.parametrize("how", ["file", "tables"])
def test_the_tables_of_a_checkpoint_that_failed_do_not_fill_the_disk(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter(tmp_path)
    kept = _make_tables(tmp_path, "tables-1-aa")
    writer.save(["epoch_1.pt"], _content(tables=kept.name), {})
    failed = _make_tables(tmp_path, "tables-2-bb")
    if how == "file":
        monkeypatch.setattr(checkpoint_writer, "write_atomically", _full)
        failure: str | None = writer.save(["epoch_2.pt"], _content(tables=failed.name), {})
    else:
        failure = writer.report_failure(OSError(f"cannot save {failed}: No space left on device"))
    assert failure is not None
    assert "No space left on device; the last whole checkpoint is" in failure
    assert failure in caplog.text
    assert kept.exists()
    assert not failed.exists()


END = """
import sys, torch
from pathlib import Path
from training import checkpoint_writer
from training.atomic_files import write_atomically
def slow(*args):
    import time
    time.sleep(0.5)
    return write_atomically(*args)
checkpoint_writer.write_atomically = slow
writer = checkpoint_writer.CheckpointWriter(Path(sys.argv[1]), in_background=True)
writer.save(["epoch_1.pt"], {"w": torch.ones(1000)}, {})
raise SystemExit("the run fails")
"""


def test_an_error_elsewhere_does_not_cost_what_is_being_written(tmp_path: Path) -> None:
    words = [sys.executable, "-c", END, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert "the run fails" in done.stderr
    assert done.returncode == 1
    assert _read(tmp_path / "epoch_1.pt")["w"].sum() == 1000


def test_no_thread_starts_after_the_writer_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, in_background=True)

    def refuse(_: object) -> None:
        raise AssertionError("a thread starts")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        writer.save(["epoch_1.pt"], _content(), {})
        writer.save(["epoch_2.pt"], _content(), {})
    assert writer.close() is None
    assert _names(tmp_path) == {"epoch_1.pt", "epoch_2.pt"}
