"""Sums of what was left out, their way through a checkpoint, and the file they are written to."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from training.data.report import KEPT_SHARDS, DataReport
from training.data.samples import Counts, Problem


def counted(*counts: Counts) -> DataReport:
    report = DataReport()
    for one in counts:
        report.add(one)
    return report


def some() -> DataReport:
    return counted(
        Counts(90, {(Problem.NO_IMAGE, "a.tar"): 3, (Problem.NO_CAPTION, "a.tar"): 1}, "a.tar: 7: no caption"),
        Counts(100, {(Problem.NO_IMAGE, "b.tar"): 6}, "b.tar: 9: no image"),
        Counts(0, {}),
    )


def test_sums_and_words() -> None:
    report = some()
    assert (report.good, report.left_out, report.looked_at) == (190, 10, 200)
    assert report.fraction() == 0.05
    lines = report.summary().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("200 samples looked at, 10 left out (5.00%): 9 no image, 1 no caption")
    assert lines[1].endswith("most in b.tar (6), a.tar (4); the last: b.tar: 9: no image")


def test_nothing_left_out_and_nothing_looked_at() -> None:
    assert DataReport().fraction() == 0.0
    assert "all of them good" in counted(Counts(1234, {})).summary()
    assert "1,234 samples looked at" in counted(Counts(1234, {})).summary()


def test_a_state_goes_through_a_checkpoint() -> None:
    file = io.BytesIO()
    torch.save(some().state(), file)
    file.seek(0)
    restored = DataReport.from_state(torch.load(file, weights_only=True))
    assert restored.state() == some().state()
    more = Counts(1, {(Problem.NO_IMAGE, "c.tar"): 1}, "c.tar: 1: no image")
    once, twice = some(), restored
    once.add(more)
    twice.add(more)
    assert once.summary() == twice.summary()


def test_the_worst_shards_are_kept(tmp_path: Path) -> None:
    many = {(Problem.BAD_IMAGE, f"{number:05d}.tar"): 1 + number % 50 for number in range(2 * KEPT_SHARDS)}
    report = counted(Counts(5, many))
    restored = DataReport.from_state(report.state())
    for one in (report, restored):
        one.write(tmp_path / "r.json", 0)
        entry = json.loads((tmp_path / "r.json").read_text())["epochs"][0]
        assert len(entry["shards"]) == KEPT_SHARDS
        assert entry["other_shards"] == KEPT_SHARDS
        kept = sum(sum(kinds.values()) for kinds in entry["shards"].values())
        assert min(sum(kinds.values()) for kinds in entry["shards"].values()) == 26
        assert kept + entry["left_out_in_other_shards"] == entry["left_out"] == sum(many.values())
        assert f"and {2 * KEPT_SHARDS - 3:,} more shards" in one.summary()


def test_an_entry_per_epoch(tmp_path: Path) -> None:
    path = tmp_path / "data_report.json"
    some().write(path, 1)
    some().write(path, 0)
    counted(Counts(7, {})).write(path, 1)
    epochs = json.loads(path.read_text())["epochs"]
    assert [(entry["epoch"], entry["good"]) for entry in epochs] == [(0, 190), (1, 7)]
    assert epochs[0]["kinds"] == {Problem.NO_IMAGE: 9, Problem.NO_CAPTION: 1}
    assert epochs[0]["shards"] == {
        "b.tar": {Problem.NO_IMAGE: 6},
        "a.tar": {Problem.NO_IMAGE: 3, Problem.NO_CAPTION: 1},
    }
    assert epochs[0]["fraction_left_out"] == 0.05
    assert [file.name for file in tmp_path.iterdir()] == ["data_report.json"]


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b'{"epochs": 3}', b'{"epochs": [{"epoch": "1"}]}', b"\xff\xfe", b"[" * 100_000, b""]
)
def test_a_damaged_report_is_moved_aside(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "data_report.json"
    for _ in range(2):
        path.write_bytes(text)
        some().write(path, 3)
        assert [entry["epoch"] for entry in json.loads(path.read_text())["epochs"]] == [3]
    assert (tmp_path / "data_report.json.damaged").read_bytes() == text
    assert (tmp_path / "data_report.json.damaged.2").read_bytes() == text


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data_report.json"
    some().write(path, 0)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        some().write(path, 1)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["data_report.json"]
