"""kill -9 at any moment, then --resume latest, again and again: the run ends as the one that nothing disturbed.

Each case is a run on two ranks whose processes are all killed at random points, drawn from a seed: while it starts, trains,
saves or evaluates. It is started again each time until it comes to its end. Then every step's numbers and the last checkpoint
must be, to the bit, those of the uninterrupted run: so no sample was lost or seen twice, and no state was left behind.

FAULT_KILLS=200 runs the long form.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from end_to_end.corpus import Corpus
from end_to_end.faults.processes import Run
from end_to_end.runs import flat_tensors, read_checkpoint_file, read_lines

KILLS = int(os.environ.get("FAULT_KILLS", 20))
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
WAIT = 120.0
# What no two runs have in common.
TIMES = ("samples_per_second", "seconds_per_step", "data_wait_share")


@dataclass
class Whole:
    """An uninterrupted run: what it learnt, what it told, and how long it took."""

    checkpoint: dict[str, torch.Tensor]
    metrics: list[dict]
    results: list[dict]
    report: dict
    seconds: float


def flags(corpus: Corpus, case: str, logs: Path) -> list[str]:
    """The command line of a case."""
    train = damaged(corpus, corpus.folder) if case == "broken data" else corpus.train
    return [
        *(*corpus.model, "--train-data", train, "--val-data", corpus.validation, "--logs", str(logs), "--name", "run"),
        *("--epochs", str(EPOCHS), "--batch-size", "8", "--warmup", "2", "--lr", "1e-3", "--precision", "fp32"),
        *("--device", "cpu", "--shuffle-buffer", "20", "--log-every-n-steps", "1", "--val-frequency", "2"),
        *(*SAVING, "--resume", "latest", *CASES[case]),
    ]


def damaged(corpus: Corpus, folder: Path) -> str:
    """A copy of the shards with pictures zeroed, a shard cut and one that holds nothing; sizes from before the damage."""
    copy = folder / "damaged"
    if not copy.exists():
        copy.mkdir()
        sizes = {}
        for number, size in enumerate((50, 40, 60, 30, 20)):
            path = copy / f"{number:05d}.tar"
            shutil.copy(corpus.folder / path.name, path)
            sizes[path.name] = size
        (copy / "sizes.json").write_text(json.dumps(sizes))
        content = bytearray((copy / "00000.tar").read_bytes())
        for sample in (3, 17, 40):  # three members of a sample, each a header and one block of content at least
            at = content.index(b"\x89PNG", sample * len(content) // 50)
            content[at : at + 200] = bytes(200)
        (copy / "00000.tar").write_bytes(bytes(content))
        whole = (copy / "00002.tar").read_bytes()
        (copy / "00002.tar").write_bytes(whole[: len(whole) * 3 // 4])
        (copy / "00004.tar").write_bytes(b"")
    return f"{copy}/{{00000..00003}}.tar"


def told(folder: Path, name: str) -> list[dict]:
    """Lines of a file without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(folder / "run" / name)]


def outcome(logs: Path, seconds: float) -> Whole:
    """What a finished run has left."""
    checkpoint = flat_tensors(read_checkpoint_file(logs / "run" / "checkpoints" / f"epoch_{EPOCHS}.pt"))
    report = json.loads((logs / "run" / "data_report.json").read_text())
    return Whole(checkpoint, told(logs, "metrics.jsonl"), told(logs, "results.jsonl"), report, seconds)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """whole(case): the uninterrupted run, made once."""
    made: dict[str, Whole] = {}

    def run(case: str) -> Whole:
        if case not in made:
            logs = tmp_path_factory.mktemp("whole") / "logs"
            began = time.monotonic()
            with Run(2, flags(corpus, case, logs), logs.parent) as ranks:
                assert ranks.wait(WAIT) == [0, 0], ranks.said(0)[-3000:] + ranks.said(1)[-3000:]
            made[case] = outcome(logs, time.monotonic() - began)
        return made[case]

    return run


def same(found: Whole, expected: Whole) -> None:
    """To the bit."""
    steps = int(expected.checkpoint["/step"])
    assert [line["step"] for line in expected.metrics] == list(range(1, steps + 1))
    assert found.metrics == expected.metrics
    assert found.results == expected.results
    assert found.report == expected.report
    assert found.checkpoint.keys() == expected.checkpoint.keys()
    for name, value in expected.checkpoint.items():
        assert torch.equal(value, found.checkpoint[name]), name


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
            with Run(2, flags(corpus, case, logs), logs.parent) as ranks:
                statuses = ranks.wait(rng.uniform(0.0, TIMES_LONGER * expected.seconds))
                if statuses == [0, 0]:
                    break
                ended_badly = [status for status in statuses if status not in (None, 0)]
                assert not ended_badly, ranks.said(0)[-3000:] + ranks.said(1)[-3000:]
                ranks.kill()
                kills += 1
        finished += 1
        same(outcome(logs, 0.0), expected)
        assert not list((logs / "run" / "checkpoints").glob(".*"))  # what was half-written when a process was killed
    print(f"{case}: {kills} kills in {finished} runs of {len(expected.metrics)} steps; samples lost 0, repeated 0")
