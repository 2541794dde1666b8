"""The evaluation program with a stand-in for the measuring: what is left is files, ranks and failures.

python fake_suite.py FLAGS…      FAKE: JSON with "slow" (seconds per task), "broken", "crash" and "crash_on_rank"
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from evaluation import main
from evaluation.datacomp import run
from evaluation.datacomp.errors import MissingData
from evaluation.datacomp.tasks import TASKS, Task
from evaluation.errors import UserError


def find_data(task: Task, data_dir: Path) -> Path:
    """The task's folder."""
    folder = data_dir / task.folder
    if not folder.is_dir():
        raise MissingData(f"{folder} does not exist")
    return folder


def score(task: Task) -> float:
    """A number that is the task's own."""
    return (1 + list(TASKS).index(task.key)) / 100


def measure_task(task: Task, data_dir: Path, model: Any) -> dict[str, Any]:
    """The task's own number, after what FAKE says; the ranks meet, as in a gather of features."""
    orders = json.loads(os.environ.get("FAKE", "{}"))
    time.sleep(orders.get("slow", 0))
    if task.key == orders.get("broken"):
        raise UserError(f"sample 7 of {data_dir / task.folder}/test/0.tar is broken; rebuild it.")
    if task.key == orders.get("crash") and orders.get("crash_on_rank") in (None, int(os.environ.get("RANK", "0"))):
        raise RuntimeError("out of memory")
    if dist.is_initialized():
        dist.barrier()
    value = score(task)
    return {"acc1": value, "acc5": None, "main_metric": value if task.main_metric else None}


def make_data(data_dir: Path, *keys: str) -> Path:
    """Folders for the tasks of these keys, all by default."""
    for key in keys or TASKS:
        (data_dir / TASKS[key].folder).mkdir(parents=True, exist_ok=True)
    return data_dir


class FakeModel:
    """What stands for measure.TaskModel."""

    def __init__(self, *_: Any) -> None:
        self.samples = dict.fromkeys(TASKS, 12)


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in place."""
    patch.setattr(run, "TaskModel", FakeModel)
    patch.setattr(run, "measure_task", measure_task)
    patch.setattr(run, "find_data", find_data)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch)
        status = main.main(sys.argv[1:])
    raise SystemExit(status)
