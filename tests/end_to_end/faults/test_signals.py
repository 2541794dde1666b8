"""Signals at every moment of a run, then --resume latest: the run ends, to the bit, as the one that nobody disturbed.

A rank is held up where it is about to enter a phase, signalled there, and let go. So each case takes one run through its
phases, one start after the other.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from end_to_end.corpus import Corpus
from end_to_end.faults import disturbances
from end_to_end.faults.outcomes import Whole, flags, same, undisturbed
from end_to_end.processes import Run
from training.atomic_files import verify
from training.preemption import EXIT_INTERRUPTED

EPOCHS = 2
# From a signal to the end of all ranks: a step, a checkpoint, and the way out of an evaluation.
SOON = 20.0
PER_SAMPLE = ("--objective", "fastclip", "--temperature_scheme", "individual_learnable", "--data_size", "1000")
KINDS = {
    "two ranks": (2, ("--objective", "neuclip", "--npn_num_protos", "24", "--workers", "1")),
    "accumulation": (2, (*PER_SAMPLE, "--workers", "1", "--accum-freq", "2", "--batch-size", "4")),
    "one rank": (1, (*PER_SAMPLE, "--workers", "2")),
}
# Where a run is before its first step, and where nothing can be saved.
MEETING = ("training.main:distributed.connect", 1)
CHECKING = ("training.main:check_train_data", 1)
# Where it can.
FIRST_STEP = ("training.loop:training_step", 1)
MID_EPOCH = ("training.loop:training_step", 5)
SAVING = ("training.atomic_files:put_in_place", 2)
EVALUATING = ("training.evaluate:measure_pairs", 1)
AFTER_LAST_STEP = ("training.main:Saver.after_epoch", 1)
BEFORE_TRAINING = (MEETING, CHECKING)


class Case(NamedTuple):
    """sends: the signal, by a function of the run. pauses: on every rank, or on rank 0 alone."""

    kind: str
    number: signal.Signals
    to: tuple[int, ...]
    phases: tuple[tuple[str, int], ...]
    more: tuple[str, ...] = ()


CASES = {
    "USR1 to all": Case("two ranks", signal.SIGUSR1, (), (MEETING, FIRST_STEP, SAVING, EVALUATING, AFTER_LAST_STEP)),
    "TERM to rank 1": Case("two ranks", signal.SIGTERM, (1,), (CHECKING, MID_EPOCH, EVALUATING, EVALUATING)),
    "TERM to rank 0 in the background": Case(
        "accumulation", signal.SIGTERM, (0,), (CHECKING, SAVING, EVALUATING), ("--save-in-background",)
    ),
    "INT to the only rank": Case(
        "one rank", signal.SIGINT, (0,), (CHECKING, FIRST_STEP, MID_EPOCH, SAVING, EVALUATING)
    ),
}


def kind_flags(corpus: Corpus, kind: str, logs: Path, *more: str) -> list[str]:
    """The command line of a kind of run."""
    saving = ("--val-data", corpus.validation, "--save-every-n-steps", "4", "--resume", "latest")
    return flags(corpus, logs, *saving, *KINDS[kind][1], *more, epochs=EPOCHS)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """whole(kind): the uninterrupted run, made once."""
    made: dict[str, Whole] = {}

    def run(kind: str) -> Whole:
        if kind not in made:
            logs = tmp_path_factory.mktemp("whole") / "logs"
            made[kind] = undisturbed(KINDS[kind][0], kind_flags(corpus, kind, logs), logs, EPOCHS)
        return made[kind]

    return run


def finish(kind: str, words: list[str], logs: Path) -> Whole:
    """Resume once more, to the end."""
    return undisturbed(KINDS[kind][0], words, logs, EPOCHS)


def let_go(marker: Path) -> None:
    """End a pause."""
    marker.with_name(f"{marker.name}.go").touch()


def interrupt(case: Case, words: list[str], place: tuple[str, int], marker: Path) -> None:
    """Start the run, signal it where it has come to a place, and see it end as it should."""
    ranks = KINDS[case.kind][0]
    waiting = 1 if place == SAVING else ranks  # only rank 0 writes files
    with Run(ranks, words, marker.parent, partial(disturbances.pause, place[0], marker, place[1])) as run:
        assert run.until(marker, disturbances.HERE, waiting), f"{place}: {run.said_by_all()}"
        run.signal(case.number, *case.to)
        if place not in BEFORE_TRAINING:
            for rank in case.to or range(ranks):
                assert run.until(run.file(rank), "ending after this step"), f"{place}: {run.said_by_all()}"
            let_go(marker)
        statuses = run.wait(SOON)
        said = f"{place}: {run.said_by_all()}"
        assert statuses == [EXIT_INTERRUPTED] * ranks, said
        assert "Traceback" not in said


@pytest.mark.parametrize("name", CASES)
def test_signal_in_every_phase(name: str, corpus: Corpus, whole: Callable[[str], Whole], tmp_path: Path) -> None:
    case = CASES[name]
    logs = tmp_path / "logs"
    words = kind_flags(corpus, case.kind, logs, *case.more)
    for number, place in enumerate(case.phases):
        interrupt(case, words, place, tmp_path / str(number) / "place")
    same(finish(case.kind, words, logs), whole(case.kind))


def test_batch_system_signals_workers_too(corpus: Corpus, whole: Callable[[str], Whole], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    words = kind_flags(corpus, "accumulation", logs)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        marker = tmp_path / number.name / "place"
        with Run(2, words, marker.parent, partial(disturbances.pause, MID_EPOCH[0], marker, MID_EPOCH[1])) as run:
            assert run.until(marker, disturbances.HERE, 2), run.said_by_all()
            run.signal_groups(number)
            for rank in range(2):
                assert run.until(run.file(rank), "ending after this step"), run.said_by_all()
            let_go(marker)
            assert run.wait(SOON) == [EXIT_INTERRUPTED] * 2, run.said_by_all()
            assert "Traceback" not in run.said_by_all()
    same(finish("accumulation", words, logs), whole("accumulation"))


def test_second_signal_ends_at_once_and_damages_nothing(
    corpus: Corpus, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    words = kind_flags(corpus, "two ranks", logs)
    marker = tmp_path / "second" / "place"
    # Between the writing of iter_8.pt and its taking its name: iter_4.pt and epoch_latest.pt are there.
    with Run(2, words, marker.parent, partial(disturbances.pause, SAVING[0], marker, 3)) as run:
        assert run.until(marker, disturbances.HERE), run.said_by_all()
        run.signal(signal.SIGINT)
        for rank in range(2):
            assert run.until(run.file(rank), "ending after this step"), run.said_by_all()
        began = time.monotonic()
        run.signal(signal.SIGTERM)
        assert run.wait(SOON) == [128 + signal.SIGTERM] * 2, run.said_by_all()
        assert time.monotonic() - began < 5
    folder = logs / "run" / "checkpoints"
    assert {path.name for path in folder.glob("*.pt")} == {"iter_4.pt", "epoch_latest.pt"}
    assert [verify(path) for path in folder.glob("*.pt")] == [None, None]
    same(finish("two ranks", words, logs), whole("two ranks"))


def test_hours_run_out_and_the_job_is_requeued(corpus: Corpus, whole: Callable[[str], Whole], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    words = kind_flags(corpus, "two ranks", logs, "--name", "run", "--requeue-on-signal")
    calls = tmp_path / "calls"
    jobs = {"SLURM_JOB_ID": "17", "PATH": f"{fake_scontrol(tmp_path, calls, logs)}{os.pathsep}{os.environ['PATH']}"}
    hours = partial(disturbances.hours_over_at_step, 9)
    for start in (1, 2):
        with Run(2, [*words, "--max-hours", "1"], tmp_path / f"start {start}", hours, **jobs) as run:
            assert run.wait(SOON) == [EXIT_INTERRUPTED] * 2, run.said_by_all()
            assert "--max-hours are over" in run.said(0)
        assert calls.read_text() == "requeue 17, epoch_latest.pt is there\n" * start
    same(finish("two ranks", words, logs), whole("two ranks"))


@pytest.mark.parametrize(
    ("number", "preempted", "times"),
    [(signal.SIGUSR1, "None", 1), (signal.SIGTERM, "None", 0), (signal.SIGTERM, "2026-11-23T05:50:44", 1)],
)
def test_only_a_warning_or_preemption_requeues(
    number: signal.Signals, preempted: str, times: int, corpus: Corpus, tmp_path: Path
) -> None:
    logs, calls, marker = tmp_path / "logs", tmp_path / "calls", tmp_path / "place"
    words = kind_flags(corpus, "two ranks", logs, "--requeue-on-signal")
    jobs = {
        "SLURM_JOB_ID": "17",
        "PATH": f"{fake_scontrol(tmp_path, calls, logs, preempted)}{os.pathsep}{os.environ['PATH']}",
    }
    with Run(2, words, tmp_path, partial(disturbances.pause, FIRST_STEP[0], marker), **jobs) as run:
        assert run.until(marker, disturbances.HERE, 2), run.said_by_all()
        run.signal(number)
        for rank in range(2):
            assert run.until(run.file(rank), "ending after this step"), run.said_by_all()
        let_go(marker)
        assert run.wait(SOON) == [EXIT_INTERRUPTED] * 2, run.said_by_all()
    asked = calls.read_text().splitlines()
    assert [call for call in asked if call.startswith("requeue")] == ["requeue 17, epoch_latest.pt is there"] * times


@pytest.mark.parametrize("place", [MEETING, MID_EPOCH])
def test_no_rank_leaves_before_the_job_is_requeued(place: tuple[str, int], corpus: Corpus, tmp_path: Path) -> None:
    """A launcher kills rank 0 as soon as another one has ended."""
    words = kind_flags(corpus, "two ranks", tmp_path / "logs", "--requeue-on-signal")
    marker, requeuing = tmp_path / "place", tmp_path / "requeuing"
    prepare = partial(
        disturbances.together,
        partial(disturbances.pause, place[0], marker, place[1]),
        partial(disturbances.pause, "training.main:requeue_job", requeuing),
    )
    with Run(2, words, tmp_path, prepare) as run:
        assert run.until(marker, disturbances.HERE, 2), run.said_by_all()
        run.signal(signal.SIGUSR1)
        if place == MID_EPOCH:
            for rank in range(2):
                assert run.until(run.file(rank), "ending after this step"), run.said_by_all()
            let_go(marker)
        assert run.until(requeuing, disturbances.HERE), run.said_by_all()
        assert run.wait(2.0) == [None, None], run.said_by_all()
        let_go(requeuing)
        run.ranks[0].join(SOON)
        assert run.ranks[0].exitcode == EXIT_INTERRUPTED, run.said_by_all()


def fake_scontrol(folder: Path, calls: Path, logs: Path, preempted: str = "None") -> Path:
    """A folder with a scontrol that notes what it is asked, and whether the run has been saved."""
    place = folder / "bin"
    place.mkdir()
    program = place / "scontrol"
    program.write_text(
        "#!/bin/sh\n"
        f"test -e '{logs}/run/checkpoints/epoch_latest.pt.json' && saved='epoch_latest.pt is there'\n"
        f"echo \"$*, $saved\" >> '{calls}'\n"
        f"echo PreemptTime={preempted}\n"
    )
    program.chmod(0o755)
    return place
