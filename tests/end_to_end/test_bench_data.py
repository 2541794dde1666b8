"""--bench-data: the loader alone, its table of stages, nothing trained and nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from end_to_end.corpus import Corpus
from end_to_end.runs import run_ranks

Trainer = Callable[..., int]
STAGES = ("decode", "transform", "tokenise", "collate", "other", "whole")


def cells(output: str) -> dict[str, list[str]]:
    """The table's lines: stage → its numbers as text."""
    lines = re.findall(r"^\| ([a-z ]+?) \| (.*) \|$", output, re.MULTILINE)
    return {stage: numbers.split(" | ") for stage, numbers in lines if stage != "stage"}


def check_table(output: str, read: str, whole: str = "100%") -> None:
    found = cells(output)
    assert tuple(found) == (read, *STAGES)
    assert found["whole"][2] == whole
    shares = [int(numbers[2].rstrip("%")) for stage, numbers in found.items() if stage != "whole"]
    assert 94 <= sum(shares) <= 106  # each is rounded
    for stage in ("decode", "transform", "whole"):
        assert float(found[stage][0]) > 0


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("kind", ["shards", "table", "synthetic"])
def test_every_kind_of_data(kind: str, workers: str, train: Trainer, corpus: Corpus, tmp_path: Path, capsys) -> None:
    data = {
        "shards": ["--train-data", corpus.train],
        "table": ["--train-data", corpus.table, "--csv-img-key", "filepath"],
        "synthetic": ["--dataset-type", "synthetic", "--train-num-samples", "32"],
    }[kind]
    # More steps than an epoch has: the epochs follow each other.
    assert train(*data, "--bench-data", "6", "--batch-size", "8", "--workers", workers) == 0
    output = capsys.readouterr().out
    check_table(output, "tar read" if kind == "shards" else "row read")
    rate = float(re.search(r"([\d,]+) images/s on 1 ranks", output)[1].replace(",", ""))
    assert rate > 0
    assert not (tmp_path / "logs").exists()


def test_ranks_are_added_up(corpus: Corpus, tmp_path: Path) -> None:
    flags = [
        "--train-data",
        corpus.train,
        "--bench-data",
        "3",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    results = run_ranks(2, [*corpus.model, *flags, "--logs", str(tmp_path / "logs")])
    assert [done.returncode for done in results] == [0, 0], results
    assert "images/s on 2 ranks" in results[0].stdout
    check_table(results[0].stdout, "tar read")
    assert "images/s" not in results[1].stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bench-data", "0"], "--bench-data 0 is out of range: give 1 or more"),
        (["--bench-data", "many"], "--bench-data: invalid int value"),
        (["--decode", "draft"], "--decode: invalid choice"),
        (["--bench-data", "--model", "ViT-B-33"], "--model ViT-B-33 is unknown"),
        (["--bench-data", "--train-data", "/no/such.tar"], "/no/such.tar does not exist"),
        (["--bench-data", "--batch-size", "1000"], "--batch-size 1000 on 1 ranks"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], message: str, train: Trainer, corpus: Corpus, capsys) -> None:
    assert train("--train-data", corpus.train, "--batch-size", "8", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
