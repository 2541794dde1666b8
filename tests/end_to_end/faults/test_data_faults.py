"""Data that are broken, vanish or do not come, in whole runs on two ranks."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from end_to_end.corpus import Corpus
from end_to_end.faults import disturbances
from end_to_end.faults.damaged_shards import damaged
from end_to_end.faults.outcomes import WAIT, flags, told
from end_to_end.processes import Run

OBJECTIVE = ("--objective", "openclip")


def words(corpus: Corpus, logs: Path, train: str, *more: str) -> list[str]:
    """The command line."""
    return flags(corpus, logs, *OBJECTIVE, "--train-data", train, *more)


def report(logs: Path) -> list[dict]:
    """The epochs of data_report.json."""
    return json.loads((logs / "run" / "data_report.json").read_text())["epochs"]


@pytest.mark.parametrize(("limit", "status"), [("0.05", 1), ("0.5", 0)])
def test_broken_share_of_the_data(limit: str, status: int, corpus: Corpus, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    given = words(corpus, logs, damaged(corpus), "--max-bad-fraction", limit, "--workers", "2", "--stop_epochs", "1")
    with Run(2, given, tmp_path) as run:
        assert run.wait(WAIT) == [status, status], run.said_by_all()
        assert "Traceback" not in run.said_by_all()
        said = run.said(0)
    assert (f"more of the data is broken than --max-bad-fraction {limit} allows" in said) == bool(status)
    (epoch,) = report(logs)
    assert epoch["left_out"] == sum(epoch["kinds"].values()) > 0
    assert {Path(shard).name for shard in epoch["shards"]} == {"00000.tar", "00002.tar"}
    assert epoch["fraction_left_out"] == pytest.approx(epoch["left_out"] / epoch["looked_at"])
    kinds = ", ".join(f"{number} {kind}" for kind, number in epoch["kinds"].items())
    assert f"{epoch['looked_at']} samples looked at, {epoch['left_out']} left out" in said
    assert kinds in said
    # All the same, each rank has as many steps as there are whole batches of what should be there.
    assert [line["step"] for line in told(logs, "metrics.jsonl")] == list(range(1, 12))
    assert (logs / "run" / "checkpoints" / "epoch_1.pt").exists()


def test_shard_vanishes_between_two_epochs(corpus: Corpus, tmp_path: Path) -> None:
    data, logs, marker = tmp_path / "data", tmp_path / "logs", tmp_path / "place"
    data.mkdir()
    for path in corpus.folder.glob("0000?.tar"):
        shutil.copy(path, data)
    given = words(corpus, logs, f"{data}/{{00000..00004}}.tar", "--workers", "1")
    prepare = partial(disturbances.pause, "training.main:Saver.after_epoch", marker)
    with Run(2, given, tmp_path, prepare) as run:
        assert run.until(marker, disturbances.HERE, 2), run.said_by_all()
        (data / "00003.tar").unlink()
        marker.with_name("place.go").touch()
        assert run.wait(WAIT) == [0, 0], run.said_by_all()
        assert "Traceback" not in run.said_by_all()
    first, second = report(logs)
    assert first["left_out"] == 0
    assert [Path(shard).name for shard in second["shards"]] == ["00003.tar"]
    assert [line["step"] for line in told(logs, "metrics.jsonl")] == list(range(1, 25))


def test_pipe_that_stalls_says_what_came_before(corpus: Corpus, tmp_path: Path) -> None:
    logs, silent, marker = tmp_path / "logs", tmp_path / "silent", tmp_path / "place"
    script = tmp_path / "deliver.sh"
    script.write_text(f"if [ -e {silent} ]; then exec sleep 600; fi; cat $1\n")
    shards = f"pipe:sh {script} {corpus.folder}/{{00000..00001}}.tar"
    given = words(corpus, logs, shards, "--workers", "1", "--data-timeout", "3", "--train-num-samples", "80")
    # The first epoch is through.
    prepare = partial(disturbances.pause, "training.main:Saver.after_epoch", marker)
    with Run(2, given, tmp_path, prepare) as run:
        assert run.until(marker, disturbances.HERE, 2), run.said_by_all()
        silent.touch()
        marker.with_name("place.go").touch()
        assert run.wait(WAIT) == [2, 2], run.said_by_all()
        assert "Traceback" not in run.said_by_all()
        said = run.said(0)
    assert "no batch came for 3 s (--data-timeout 3)" in said
    assert f"sh {script} {corpus.folder}/00000.tar" in said.partition("no batch came")[2]
