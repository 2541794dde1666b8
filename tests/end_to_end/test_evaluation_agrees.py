"""What a run says of itself between epochs is what the evaluation program says of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from end_to_end.corpus import Corpus
from end_to_end.runs import read_lines
from evaluation.main import main as evaluate

SPELLED = {"top1": "top1", "top5": "top5", "mean_per_class_recall": "mean-per-class-recall"}


def trained(train: Callable[..., int], corpus: Corpus, tmp_path: Path, precision: str) -> Path:
    """The folder of a run that evaluates itself after its last epoch."""
    sets = [
        "--val-data",
        corpus.validation,
        "--zeroshot-data",
        corpus.zeroshot,
        "--zeroshot-frequency",
        "6",
        "--val-frequency",
        "6",
    ]
    plan = ["--epochs", "6", "--batch-size", "20", "--lr", "4e-3", "--warmup", "2", "--seed", "3", "--name", "run"]
    assert (
        train("--train-data", corpus.train, *plan, *sets, "--precision", precision, "--report-to", "tensorboard") == 0
    )
    return tmp_path / "logs" / "run"


@pytest.mark.parametrize(("while_training", "afterwards"), [("fp32", "fp32"), ("amp_bf16", "bf16")])
def test_same_numbers_and_pictures(
    train: Callable[..., int], corpus: Corpus, tmp_path: Path, while_training: str, afterwards: str
) -> None:
    folder = trained(train, corpus, tmp_path, while_training)
    (said,) = read_lines(folder / "results.jsonl")
    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    shown.Reload()
    assert {"val/gallery", "val/curves"} <= set(shown.Tags()["images"])
    given = [
        "--pairs",
        corpus.validation,
        "--zeroshot",
        corpus.zeroshot,
        "--device",
        "cpu",
        "--workers",
        "0",
        "--precision",
        afterwards,
    ]
    assert evaluate(["--train_output_dir", str(folder), *given]) == 0
    measured = json.loads((folder / "evaluation.json").read_text())["metrics"]
    compared = 0
    for name, value in measured.items():
        task, _, short = name.partition("/")
        own = f"zeroshot-val-{SPELLED[short]}" if task == "zeroshot" else name.removeprefix("retrieval/")
        if value is not None:
            assert said[own] == pytest.approx(value, abs=1e-6), name
            # tensorboard holds float32
            assert shown.Scalars(f"val/{own}")[-1].value == pytest.approx(said[own], rel=1e-6)
            compared += 1
    assert compared >= 20
