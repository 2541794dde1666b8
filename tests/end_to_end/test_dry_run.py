"""--dry-run: all of a run but its data and its files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from end_to_end.corpus import Corpus
from end_to_end.runs import ROOT, clean_environment, run_ranks
from neuclip.objectives import OBJECTIVES
from training import dry_run

Trainer = Callable[..., int]
# Of an epoch as large as CC3M's; the table of fastclip would be 8 GB.
LARGE = ("--train-num-samples", "2723840", "--data_size", "1000000000", "--batch-size", "128", "--epochs", "37")


def files(folder: Path) -> dict[Path, bytes]:
    """Everything below a folder that is no test data."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def row(output: str, name: str) -> str:
    """A line of the plan."""
    found = re.search(rf"^\S+ I {name}  +(.*)$", output, re.MULTILINE)
    assert found is not None, output
    return found[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_takes_two_steps_and_leaves_nothing(
    objective: str, train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train("--objective", objective, "--dry-run", "8", *LARGE, "--name", "large", "--report-to", "tensorboard") == 0
    )
    output = capsys.readouterr().out
    assert row(output, "run").startswith("large in ")
    assert row(output, "objective").startswith(objective)
    assert row(output, "batch") == "128 per rank, 1024 in all"
    assert row(output, "epoch") == "2,660 steps, 2,723,840 samples"
    assert row(output, "samples seen") == "100,782,080 in 37 epochs, 98,420 steps"
    assert "step 2/2" in output
    assert "dry run: 2 steps of 4 synthetic samples done; nothing was kept" in output
    smaller = output.splitlines()[-1]
    for change in ("--batch-size 128 → 4", "8 ranks → 1"):
        assert change in smaller
    assert ("--data_size 1000000000 → 8" in smaller) == OBJECTIVES[objective].needs_keys
    assert files(tmp_path) == {}


def test_without_ranks_the_plan_is_of_those_there_are(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--train-num-samples", "64", "--batch-size", "4", "--accum-freq", "2", "--precision", "fp32")
    assert train("--dry-run", *flags) == 0
    output = capsys.readouterr().out
    assert row(output, "batch") == "4 per rank × 2 micro-batches, 8 in all"
    assert "2 steps of 8 synthetic samples" in output
    assert output.splitlines()[-1].endswith("made smaller for the steps: nothing")


@pytest.mark.parametrize("kind", ["shards", "glob", "table"])
def test_absent_data_are_a_note(kind: str, train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {
        "shards": str(tmp_path / "{000..003}.tar"),
        "glob": str(tmp_path / "*.tar"),
        "table": str(tmp_path / "gone.csv"),
    }[kind]
    flags = ("--dry-run", "--train-data", data, "--batch-size", "4", "--dataset-resampled")
    if kind == "table":
        flags = flags[:-1]
    assert train(*flags, "--train-num-samples", "48") == 0
    output = capsys.readouterr().out
    assert row(output, "data").startswith(f"NOT HERE (--train-data {data}: ")
    assert row(output, "epoch") == "12 steps, 48 samples"


def test_data_that_are_there_are_looked_at(
    train: Trainer, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--train-data", corpus.train, "--batch-size", "16")
    assert train("--dry-run", *data) == 0
    output = capsys.readouterr().out
    assert row(output, "data").startswith("webdataset: 5 shards, samples: 200")
    assert row(output, "epoch") == "12 steps, 192 samples"
    assert train("--dry-run", *data, "--objective", "fastclip", "--data_size", "210") == 2
    assert "--data_size 210 is too small" in capsys.readouterr().err
    assert files(tmp_path) == {}


def test_a_run_that_is_there_is_not_touched(
    train: Trainer, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--name", "run", "--train-data", corpus.train, "--batch-size", "16", "--train-num-samples", "16")
    assert train(*flags, "--epochs", "1") == 0
    before = files(tmp_path)
    assert train(*flags, "--dry-run", "--resume", "latest") == 0
    assert train(*flags, "--dry-run") == 2
    assert "--name run exists already" in capsys.readouterr().err
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "ViT-B-33"), "--model ViT-B-33 is unknown"),
        (("--batch-size", "1000"), "--batch-size 1000 on 1 ranks"),
        (("--dry-run", "-1"), "--dry-run -1 is out of range"),
        (("--bench-data", "3"), "--bench-data 3 reads data and --dry-run does not"),
        (("--npn_lr", "0", "--objective", "neuclip"), "--npn_lr 0.0"),
    ],
)
def test_a_mistake_is_one_line(
    flags: tuple[str, ...], message: str, train: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--dry-run", "--train-num-samples", "64", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_evaluation_sets_may_be_absent(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--train-num-samples", "64", "--batch-size", "4", "--val-data", "/no/such.tar")
    assert train("--dry-run", *flags) == 0
    output = capsys.readouterr().out
    assert "evaluation: --val-data" in output
    assert "step 2/2" in output


def test_a_batch_that_does_not_fit_is_halved(
    train: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = dry_run.train_one_epoch
    tried: list[int] = []

    def in_small_memory(training: Any, epoch: int) -> None:
        tried.append(training.args.batch_size)
        if training.args.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        whole(training, epoch)

    monkeypatch.setattr(dry_run, "train_one_epoch", in_small_memory)
    flags = ("--dry-run", "--train-num-samples", "64", "--batch-size", "4")
    assert train(*flags) == 0
    assert tried == [4, 2]
    output = capsys.readouterr().out
    assert "2 steps of 2 synthetic samples" in output
    assert "--batch-size 4 → 2, for want of memory: give --accum-freq" in output
    monkeypatch.setattr(dry_run, "train_one_epoch", _never_fits)
    assert train(*flags) == 2
    assert "--batch-size 2 does not fit into the GPU's memory: give --accum-freq" in capsys.readouterr().err


def _never_fits(training: Any, epoch: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_loss_that_is_not_finite_is_told(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--train-num-samples", "64", "--batch-size", "4", "--lr", "1e38", "--warmup", "0", "--objective", "siglip")
    assert train("--dry-run", *flags) == 0
    assert "was not finite in 1 of 2 steps" in capsys.readouterr().out


def test_two_ranks(corpus: Corpus, tmp_path: Path) -> None:
    flags = ["--dry-run", "--train-num-samples", "640", "--batch-size", "32", "--objective", "neuclip"]
    results = run_ranks(2, [*corpus.model, *flags, "--device", "cpu", "--logs", str(tmp_path / "logs")])
    assert [done.returncode for done in results] == [0, 0], results
    assert row(results[0].stdout, "batch") == "32 per rank, 64 in all"
    assert "2 steps of 8 synthetic samples done" in results[0].stdout
    assert "dry run" not in results[1].stdout
    assert files(tmp_path) == {}


def test_a_recipe_without_slurm(corpus: Corpus, tmp_path: Path) -> None:
    """The script that people submit, on a laptop without data; the model is small, for the time that it takes."""
    script = ROOT / "scripts" / "slurm" / "cc12m" / "neuclip.sbatch"
    environment = {name: value for name, value in clean_environment().items() if name != "SLURM_SUBMIT_DIR"}
    flags = [*corpus.model, "--logs", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        ["bash", str(script), "--dry-run", *flags],
        cwd=ROOT,
        env={**environment, "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRAIN_DATA is not set" in done.stdout
    assert row(done.stdout, "batch") == "256 per rank, 2048 in all"
    assert row(done.stdout, "samples seen").startswith("303,181,824 in 33 epochs")
    assert "dry run: 2 steps of 4 synthetic samples done" in done.stdout
    assert files(tmp_path) == {}
