"""The command on real small sets, one of each kind: on one rank and on two, with a set that is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.datacomp.tasks import TASKS
from evaluation.main import main

from . import sets

ROOT = Path(__file__).resolve().parents[3]
KEYS = (
    "vtab/caltech101",
    "mnist",
    "retrieval/flickr_1k_test_image_text_retrieval",
    "misc/winogavil",
    "wilds/fmow",
    "fairness/dollar_street",
    "fairness/utkface",
)
BROKEN = "mnist"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for key in KEYS:
        sets.write_set(key, folder)
    shard = folder / TASKS[BROKEN].folder / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    return folder


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    rows = (folder / "eval_results" / "epoch_1_eval_results.jsonl").read_text().splitlines()
    return {line["key"]: line for line in map(json.loads, rows)}


def test_one_rank_and_two_give_the_same_and_a_broken_set_stops_no_other(
    make_run: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("run", epochs=(1,))
    other = shutil.copytree(folder, tmp_path / "logs" / "other")
    flags = ["--data_dir", str(data), "--epoch", "1", "--device", "cpu", "--workers", "0", "--batch_size", "8"]
    assert main(["--train_output_dir", str(folder), *flags]) == 1
    out = capsys.readouterr().out
    assert f"FAILED: {BROKEN}: " in out
    assert "/wds_mnist_test/test/1.tar" in out
    alone = lines_of(folder)
    assert set(alone) == set(KEYS) - {BROKEN}
    assert all(line["images"] > 0 for line in alone.values())
    assert all(line["metrics"]["main_metric"] is not None for key, line in alone.items() if TASKS[key].main_metric)

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    command = [*launcher, str(ROOT / "src" / "evaluation" / "main.py"), "--train_output_dir", str(other), *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout.count(f"FAILED: {BROKEN}: ") == 1, done.stdout + done.stderr
    assert done.returncode != 0
    shared = lines_of(other)
    assert set(shared) == set(alone)
    for key, line in alone.items():
        assert shared[key]["metrics"] == pytest.approx(line["metrics"], abs=1e-6, nan_ok=False), key
        assert shared[key]["images"] == line["images"]

    # Mended, the broken set is all that is left to do.
    shutil.rmtree(data / TASKS[BROKEN].folder)
    sets.write_set(BROKEN, data)
    assert main(["--train_output_dir", str(other), *flags]) == 0
    assert "tasks: 1 to do, 6 finished before" in capsys.readouterr().out
