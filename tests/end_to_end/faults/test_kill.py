"""kill -9 at any moment, then --resume latest, again and again: the run ends as the one that nothing disturbed.

Each case is a run on two ranks whose processes are all killed at random points, drawn from a seed: while it starts, trains,
saves or evaluates. It is started again each time until it comes to its end. Then every step's numbers and the last checkpoint
must be, to the bit, those of the uninterrupted run: so no sample was lost or seen twice, and no state was left behind.

FAULT_KILLS=200 runs the long form.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from end_to_end.corpus import Corpus
from end_to_end.faults.damaged_shards import damaged
from end_to_end.faults.outcomes import Whole, flags, outcome, same, undisturbed
from end_to_end.processes import Run

KILLS = int(os.environ.get("FAULT_KILLS", 8))
EPOCHS = 3
SAVING = ("--save-every-n-steps", "3", "--save-most-recent", "--keep-last", "2")
CASES = {
    "moving averages and temperatures per sample": (
        *("--objective", "fastclip", "--temperature_scheme", "individual_learnable", "--data_size", "1000"),
        *("--workers", "2", "--accum-freq", "2", "--batch-size", "4"),
    ),
    "prototypes": ("--objective", "neuclip", "--npn_num_protos", "24", "--npn_restart_iter", "7", "--workers", "1"),
    "networks of their own, in the background": (
        *("--objective", "amorlip", "--lambda-update-frequency", "3", "--workers", "0", "--save-in-background"),
    ),
    "broken data": ("--objective", "openclip", "--local-loss", "--gather-with-grad", "--workers", "2"),
}
# Of a run's time. A kill later than its end falls into the next run's start.
TIMES_LONGER = 1.1


def case_flags(corpus: Corpus, case: str, logs: Path) -> list[str]:
    """The command line of a case."""
    data = ("--train-data", damaged(corpus)) if case == "broken data" else ()
    validation = ("--val-data", corpus.validation, "--val-frequency", "2")
    return flags(corpus, logs, *data, *validation, *SAVING, "--resume", "latest", *CASES[case], epochs=EPOCHS)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """whole(case): the uninterrupted run, made once."""
    made: dict[str, Whole] = {}

    def run(case: str) -> Whole:
        if case not in made:
            logs = tmp_path_factory.mktemp("whole") / "logs"
            made[case] = undisturbed(2, case_flags(corpus, case, logs), logs, EPOCHS)
        return made[case]

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(60 + 60 * KILLS)
def test_killed_run_ends_as_if_nothing_had_happened(
    case: str, corpus: Corpus, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    expected = whole(case)
    rng = random.Random(f"{case} {KILLS}")
    kills, finished = 0, 0
    while kills < -(-KILLS // len(CASES)):
        logs = tmp_path / str(finished) / "logs"
        logs.parent.mkdir()
        while True:
            with Run(2, case_flags(corpus, case, logs), logs.parent) as ranks:
                statuses = ranks.wait(rng.uniform(0.0, TIMES_LONGER * expected.seconds))
                if statuses == [0, 0]:
                    break
                ended_badly = [status for status in statuses if status not in (None, 0)]
                assert not ended_badly, ranks.said_by_all()
                ranks.kill()
                kills += 1
        finished += 1
        same(outcome(logs, EPOCHS), expected)
        assert not list((logs / "run" / "checkpoints").glob(".*"))  # what was half-written when a process was killed
    print(f"{case}: {kills} kills in {finished} runs of {len(expected.metrics)} steps; samples lost 0, repeated 0")
