"""Signals at every moment of a run, then --resume latest: the run ends, to the bit, as the one that nobody disturbed.

A rank is held up where it is about to enter a phase, signalled there, and let go. So each case takes one run through all phases,
a process for each.
"""

from __future__ import annotations

import json
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
from end_to_end.faults.outcomes import Whole, flags, outcome, same, undisturbed
from end_to_end.faults.processes import Run
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
EVALUATING = ("training.evaluate:encode_share", 1)
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
    "USR1 to all": Case(
        "two ranks", signal.SIGUSR1, (), (MEETING, CHECKING, FIRST_STEP, MID_EPOCH, SAVING, AFTER_LAST_STEP, EVALUATING)
    ),
    "TERM to rank 1": Case("two ranks", signal.SIGTERM, (1,), (FIRST_STEP, MID_EPOCH, SAVING, EVALUATING)),
    "TERM to rank 0 in the background": Case(
        "accumulation", signal.SIGTERM, (0,), (MID_EPOCH, SAVING, EVALUATING), ("--save-in-background",)
    ),
    "INT to the only rank": Case(
        "one rank", signal.SIGINT, (0,), (CHECKING, FIRST_STEP, MID_EPOCH, SAVING, EVALUATING, AFTER_LAST_STEP)
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


def interrupt(case: Case, words: list[str], place: tuple[str, int], marker: Path) -> tuple[list[int | None], Run]:
    """Start the run, signal it where it has come to a place, and let it go on to its end."""
    function, call = place
    held = disturbances.pause
    ranks = KINDS[case.kind][0]
    # Only rank 0 writes files.
    waiting = 1 if place == SAVING else ranks
    prepare = partial(held, function, marker, call)
    with Run(ranks, words, marker.parent, prepare) as run:
        assert run.until(marker, disturbances.HERE, waiting), f"{place}: {run.said_by_all()}"
        heard = len(run.said(case.to[0] if case.to else 0))
        run.signal(case.number, *case.to)
        if place in BEFORE_TRAINING:
            return run.wait(SOON), run
        for rank in case.to or range(ranks):
            end = time.monotonic() + SOON
            while "ending after this step" not in run.said(rank) and time.monotonic() < end:
                time.sleep(0.01)
        let_go(marker)
        statuses = run.wait(SOON)
        assert heard >= 0
        return statuses, run


@pytest.mark.parametrize("name", CASES)
def test_signal_in_every_phase(name: str, corpus: Corpus, whole: Callable[[str], Whole], tmp_path: Path) -> None:
    case = CASES[name]
    logs = tmp_path / "logs"
    words = kind_flags(corpus, case.kind, logs, *case.more)
    for number, place in enumerate(case.phases):
        marker = tmp_path / str(number) / "place"
        statuses, run = interrupt(case, words, place, marker)
        said = f"{place}: {run.said_by_all()}"
        print(place, statuses)
        assert statuses == [EXIT_INTERRUPTED] * KINDS[case.kind][0], said
        assert "Traceback" not in said
    same(finish(case.kind, words, logs), whole(case.kind))
