"""One rank of a run fails: all end soon, with its status, and what rank 0 logs first is why."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from end_to_end.corpus import Corpus
from end_to_end.faults import disturbances
from end_to_end.faults.outcomes import WAIT, flags
from end_to_end.processes import Run
from training.failures import END_SECONDS

PER_SAMPLE = ("--objective", "fastclip", "--temperature_scheme", "individual_learnable", "--data_size", "1000")
# Looking once a second and ending, on a machine where other tests run too.
SOON = END_SECONDS + 5


def words(corpus: Corpus, logs: Path, *more: str) -> list[str]:
    """The command line."""
    return flags(corpus, logs, *PER_SAMPLE, "--workers", "1", *more)


@pytest.mark.parametrize("failing", [0, 1])
def test_exception_ends_all_and_is_told_first(failing: int, corpus: Corpus, tmp_path: Path) -> None:
    marker = tmp_path / "failed"
    prepare = partial(disturbances.failure, "training.loop:training_step", marker, failing, 5)
    with Run(2, words(corpus, tmp_path / "logs"), tmp_path, prepare) as run:
        assert run.until_there(marker), run.said_by_all()
        assert run.wait(SOON) == [1, 1], run.said_by_all()
    said = run.said(0)
    assert "ValueError: made up on rank" in said
    lines = said.splitlines()
    first = next(number for number, line in enumerate(lines) if "Traceback" in line)
    cause = next(number for number, line in enumerate(lines) if "ValueError: made up on rank" in line)
    # Nothing else has been reported between the step before and the end of the traceback.
    assert "Traceback" not in "\n".join(lines[first + 1 : cause])
    assert "step 4/12" in lines[first - (2 if failing else 1)]
    assert ("rank 1 failed:" in lines[first - 1]) == (failing == 1)
    assert said.count("Traceback") == 1


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            partial(disturbances.unknown_key, 1, 5000, 5),
            "a training sample has the key 5000, outside 0 … 999 of --data_size 1000",
        ),
        (partial(disturbances.broken_from, 1, 30), "no usable sample in the data of rank 1, worker 0"),
    ],
    ids=["key out of range", "no usable sample"],
)
def test_mistake_that_one_rank_finds(prepare: Callable[[], None], message: str, corpus: Corpus, tmp_path: Path) -> None:
    with Run(2, words(corpus, tmp_path / "logs"), tmp_path, prepare) as run:
        assert run.wait(WAIT) == [2, 2], run.said_by_all()
    assert "Traceback" not in run.said_by_all()
    assert f"rank 1 failed:\nerror: {message}" in run.said(0)
    assert f"[rank 1] error: {message}" in run.said(1)
    assert len(run.said(1).split("error: ")[1].splitlines()) == 1


@pytest.mark.parametrize("workers", ["0", "1"])
def test_data_of_one_rank_do_not_come(workers: str, corpus: Corpus, tmp_path: Path) -> None:
    more = ("--data-timeout", "2", "--workers", workers)
    with Run(2, words(corpus, tmp_path / "logs", *more), tmp_path, partial(disturbances.stalled_data, 1, 4)) as run:
        assert run.wait(WAIT) == [2, 2], run.said_by_all()
    assert "Traceback" not in run.said_by_all()
    assert "rank 1 failed:\nerror: no batch came for 2 s (--data-timeout 2)" in run.said(0)
    assert "00000.tar: its first 8 samples hold .json, .png, .txt" in run.said(0)


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_the_others(killed: int, corpus: Corpus, tmp_path: Path) -> None:
    marker = tmp_path / "place"
    prepare = partial(disturbances.pause, "training.loop:training_step", marker, 5)
    with Run(2, words(corpus, tmp_path / "logs"), tmp_path, prepare) as run:
        assert run.until(marker, disturbances.HERE, 2), run.said_by_all()
        run.signal(signal.SIGKILL, killed)
        marker.with_name("place.go").touch()
        statuses = run.wait(SOON)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 1, run.said_by_all()
