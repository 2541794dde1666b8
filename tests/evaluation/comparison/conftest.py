"""Run folders as training and evaluation leave them, with numbers made up for a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

RunMaker = Callable[..., Path]
STEPS_PER_EPOCH, BATCH, EVERY = 40, 8, 20
FLAGS = {"objective": "neuclip", "npn_optimization": "alternating", "npn_restart_iter": 500, "npn_num_protos": 64}


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """make_run(name, offset, told, datacomp, batch, **flags): R@1 is 0.1·epoch + offset, the loss 4 − step/100 + offset.

    Every interval of NPN time is 1 ms, of the objective 3 ms, of the step 10 ms, after a slow beginning; `told` of the
    epochs have been trained so far, in global batches of `batch` samples.
    """

    def make(
        name: str, offset: float = 0.0, told: int = 2, datacomp: bool = False, batch: int = BATCH, **flags: Any
    ) -> Path:
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        params = {**FLAGS, "lr": 0.001, "epochs": 2, "seed": 0, "name": name, "logs": str(tmp_path / "logs"), **flags}
        (folder / "params.txt").write_text("".join(f"{key}: {value}\n" for key, value in sorted(params.items())))
        training, results = [], []
        for epoch in range(told):
            for at in (1, *range(EVERY, STEPS_PER_EPOCH + 1, EVERY)):
                step = epoch * STEPS_PER_EPOCH + at
                slow = 50 if step == 1 else 1
                training.append(
                    {
                        "step": step,
                        "contrastive_loss": 4 - step / 100 + offset,
                        "epoch": step / STEPS_PER_EPOCH,
                        "samples": batch * step,
                        "seconds_per_step": 0.010 * slow,
                        "objective_seconds": 0.003 * slow,
                        "normalizer_seconds": 0.001 * slow,
                    }
                )
            done = epoch + 1
            results.append(
                {
                    "epoch": done,
                    "step": done * STEPS_PER_EPOCH,
                    "text_to_image_R@1": 0.1 * done + offset,
                    "clip_val_loss": 2.0 - 0.5 * done + offset,
                    "num_samples": 100.0,
                }
            )
            if datacomp:
                aggregates = {
                    "DataComp Average": {"value": 0.2 * done + offset, "tasks": ["mnist"], "missing": []},
                    "Retrieval": {"value": None, "tasks": [], "missing": ["flickr"]},
                }
                (folder / "eval_results").mkdir(exist_ok=True)
                (folder / "eval_results" / f"epoch_{done}_summary.json").write_text(
                    json.dumps({"aggregates": aggregates})
                )
        write_lines(folder / "metrics.jsonl", training)
        write_lines(folder / "results.jsonl", results)
        return folder

    return make
