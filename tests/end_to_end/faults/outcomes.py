"""What a run has left, compared to the bit with what a run that nothing disturbed has left."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from end_to_end.corpus import Corpus
from end_to_end.processes import Run
from end_to_end.runs import flat_tensors, read_checkpoint_file, read_lines

WAIT = 120.0
# What no two runs have in common.
TIMES = ("samples_per_second", "seconds_per_step", "data_wait_share", "objective_seconds", "normalizer_seconds")


@dataclass
class Whole:
    """A finished run: what it learnt, what it told, and how long it took."""

    checkpoint: dict[str, torch.Tensor]
    metrics: list[dict]
    results: list[dict]
    report: dict
    seconds: float


def flags(corpus: Corpus, logs: Path, *more: str, epochs: int = 2) -> list[str]:
    """The command line of a run of the tiny model that tells of every step; `more` has the last word."""
    return [
        *(*corpus.model, "--train-data", corpus.train, "--logs", str(logs), "--name", "run", "--epochs", str(epochs)),
        *("--batch-size", "8", "--warmup", "2", "--lr", "1e-3", "--precision", "fp32", "--device", "cpu"),
        *("--shuffle-buffer", "20", "--log-every-n-steps", "1", *more),
    ]


def told(logs: Path, name: str) -> list[dict]:
    """Lines of a file of the run folder without what depends on the clock; none where there is no such file."""
    path = logs / "run" / name
    lines = read_lines(path) if path.exists() else []
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def outcome(logs: Path, epochs: int, seconds: float = 0.0) -> Whole:
    """What a finished run has left."""
    checkpoint = flat_tensors(read_checkpoint_file(logs / "run" / "checkpoints" / f"epoch_{epochs}.pt"))
    report = json.loads((logs / "run" / "data_report.json").read_text())
    return Whole(checkpoint, told(logs, "metrics.jsonl"), told(logs, "results.jsonl"), report, seconds)


def undisturbed(ranks: int, words: list[str], logs: Path, epochs: int) -> Whole:
    """Run these flags to the end; `words` name `logs`."""
    began = time.monotonic()
    with Run(ranks, words, logs.parent) as run:
        assert run.wait(WAIT) == [0] * ranks, run.said_by_all()
    return outcome(logs, epochs, time.monotonic() - began)


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
