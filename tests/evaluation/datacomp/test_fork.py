"""The same numbers as the public evaluation code, on the same small sets of all 40 tasks. Slow, and on request:

DATACOMP_FORK=<its folder> DATACOMP_FORK_PYTHON=<an interpreter with requirements-eval.txt> pytest <this file>
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from evaluation.datacomp.measure import TaskModel, measure_task
from evaluation.datacomp.tasks import TASKS
from evaluation.suite import Setting

from .sets import write_set

FORK, PYTHON = os.environ.get("DATACOMP_FORK"), os.environ.get("DATACOMP_FORK_PYTHON")
ARCHITECTURE = "ViT-S-32-alt"
IMAGES = 41

pytestmark = [
    pytest.mark.skipif(not (FORK and PYTHON), reason="DATACOMP_FORK and DATACOMP_FORK_PYTHON are not set"),
    pytest.mark.timeout(3600),
]


def random_weights() -> dict[str, torch.Tensor]:
    """Random weights that tell inputs apart: with those of a fresh model all cosines are nearly the same."""
    torch.manual_seed(0)
    weights = open_clip.create_model(ARCHITECTURE).state_dict()
    for name in ("visual.conv1.weight", "token_embedding.weight"):
        weights[name] *= 30
    return weights


def run_fork(run: Path, data_dir: Path, *flags: str) -> Path:
    """Evaluate a run folder with the public code, without a network; returns the folder of its results."""
    assert FORK is not None
    assert PYTHON is not None
    # It writes nothing into its own folder, but Python would.
    offline = {
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    command = [PYTHON, "evaluate.py", "--train_output_dir", run, "--data_dir", data_dir, "--arch", ARCHITECTURE, *flags]
    done = subprocess.run(list(map(str, command)), cwd=FORK, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return run / "eval_results"


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["key"]: line["metrics"] for line in lines}


def difference(ours: Any, theirs: Any) -> float:
    """|ours − theirs|; the public code's NaN is our None."""
    if theirs is None or math.isnan(theirs):
        return 0.0 if ours is None else math.inf
    return math.inf if ours is None else abs(ours - theirs)


def test_all_tasks_have_the_numbers_of_the_public_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir, run = tmp_path / "data", tmp_path / "run"
    for task in TASKS.values():
        write_set(task, data_dir, images=IMAGES)
    (run / "checkpoints").mkdir(parents=True)
    weights = random_weights()
    torch.save({"epoch": 1, "name": "run", "state_dict": weights}, run / "checkpoints" / "epoch_1.pt")
    shutil.copy(run / "checkpoints" / "epoch_1.pt", run / "checkpoints" / "iter_7.pt")

    results = run_fork(run, data_dir, "--epoch", "1")
    assert [path.name for path in results.iterdir()] == ["epoch_1_eval_results.jsonl"]
    theirs = read_results(results / "epoch_1_eval_results.jsonl")
    assert list(theirs) == list(TASKS)

    model, _, preprocess = open_clip.create_model_and_transforms(ARCHITECTURE)
    model.load_state_dict(weights)
    tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
    own = TaskModel(model.eval(), preprocess, tokenizer, Setting(batch_size=32))
    worst: dict[str, float] = {}
    for key, task in TASKS.items():
        ours = measure_task(task, data_dir, own)
        assert set(ours) == set(theirs[key]), key
        differences = {name: difference(ours[name], value) for name, value in theirs[key].items()}
        bad = {name: (ours[name], theirs[key][name]) for name, value in differences.items() if not value <= 1e-6}
        assert not bad, f"{key}: {bad}"
        worst[task.kind.name] = max(worst.get(task.kind.name, 0.0), *differences.values())
    with capsys.disabled():
        print("\nmetrics:", sum(map(len, theirs.values())), "greatest difference by kind:", worst)

    # The contract for iterations: a file of results that holds all but one task is completed, from iter_7.pt.
    lines = (results / "epoch_1_eval_results.jsonl").read_text().splitlines(keepends=True)
    (results / "iter_7_eval_results.jsonl").write_text("".join(lines[1:]))
    run_fork(run, data_dir, "--iter", "7")
    assert read_results(results / "iter_7_eval_results.jsonl")["vtab/caltech101"] == theirs["vtab/caltech101"]
