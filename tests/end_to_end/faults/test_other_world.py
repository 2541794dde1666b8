"""A run stopped within an epoch goes on with other ranks, workers and batches: each sample of the epoch comes exactly once.

On as many ranks as before it is to the bit the run that was not stopped, on three too, where the order in which gradients
are added up matters.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from end_to_end.corpus import SHARD_SIZES, Corpus
from end_to_end.faults import disturbances
from end_to_end.faults.outcomes import WAIT, flags, outcome, same, undisturbed
from end_to_end.processes import Run
from end_to_end.runs import read_lines
from training.preemption import EXIT_INTERRUPTED

EPOCHS = 2
PER_SAMPLE = ("--objective", "fastclip", "--temperature_scheme", "individual_learnable", "--data_size", "1000")
# Random numbers are seeded from this, the epoch, the step and the rank, whatever its size.
SEED = ("--seed", "987654321")


class Start(NamedTuple):
    """A part of a run. until: steps until it is stopped, 0 for its end."""

    ranks: int
    until: int
    more: tuple[str, ...] = ()


def words(corpus: Corpus, logs: Path, *more: str) -> list[str]:
    """The command line."""
    return flags(corpus, logs, *PER_SAMPLE, *SEED, "--resume", "latest", *more, epochs=EPOCHS)


def stopped_after(steps: int, ranks: int) -> partial[None]:
    """For --max-hours 1, so many steps after the start; ranks agree one step later."""
    return partial(disturbances.hours_over_at_step, steps - (ranks > 1))


# The data have 200 samples. Batches of 5 and 4 leave none over, whatever comes before.
FIRST = Start(2, 10, ("--batch-size", "5", "--workers", "2"))
CASES = {
    "one rank": (FIRST, Start(1, 0, ("--batch-size", "5", "--workers", "2"))),
    "four ranks, then one": (
        *(FIRST, Start(4, 3, ("--batch-size", "5", "--workers", "1"))),
        Start(1, 0, ("--batch-size", "4", "--workers", "0")),
    ),
    "other workers, batch and buffer": (
        FIRST,
        Start(2, 0, ("--batch-size", "5", "--accum-freq", "2", "--workers", "3", "--shuffle-buffer", "50")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_epoch_stays_exact(name: str, corpus: Corpus, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for number, start in enumerate(CASES[name]):
        parts = [partial(disturbances.note_keys, tmp_path)]
        if start.until:
            parts.append(stopped_after(start.until, start.ranks))
        given = words(corpus, logs, *start.more, "--max-hours", "1")
        with Run(start.ranks, given, tmp_path / str(number), partial(disturbances.together, *parts)) as run:
            expected = EXIT_INTERRUPTED if start.until else 0
            assert run.wait(WAIT) == [expected] * start.ranks, run.said_by_all()
            assert "Traceback" not in run.said_by_all()
    seen = Counter(line for path in tmp_path.glob("keys of *") for line in path.read_text().splitlines())
    assert len({line.split()[1] for line in seen}) == sum(SHARD_SIZES)
    assert len(seen) == EPOCHS * sum(SHARD_SIZES)
    assert set(seen.values()) == {1}
    assert all(math.isfinite(line["loss"]) for line in read_lines(logs / "run" / "metrics.jsonl"))


def test_three_ranks_resume_to_the_bit(corpus: Corpus, tmp_path: Path) -> None:
    more = ("--batch-size", "4", "--workers", "1", "--stop_epochs", "1")
    whole = undisturbed(3, words(corpus, tmp_path / "whole" / "logs", *more), tmp_path / "whole" / "logs", 1)
    logs = tmp_path / "logs"
    with Run(3, [*words(corpus, logs, *more), "--max-hours", "1"], tmp_path, stopped_after(7, 3)) as run:
        assert run.wait(WAIT) == [EXIT_INTERRUPTED] * 3, run.said_by_all()
    with Run(3, words(corpus, logs, *more), tmp_path) as run:
        assert run.wait(WAIT) == [0] * 3, run.said_by_all()
    same(outcome(logs, 1), whole)
