"""The benchmark of the loader runs, tiny, and its numbers belong together; nothing is said about time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import loader  # noqa: E402
import photo_shards  # noqa: E402


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "loader.py"), *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_command_gives_tables_and_numbers(tmp_path: Path) -> None:
    # The test's own interpreter stands in for an environment in which open_clip's trainer may run or not.
    words = ["--sizes", "64", "--samples", "16", "--batch-size", "4", "--image-size", "24"]
    output = run(*words, "--repeats", "2", "--warmup", "0", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())["sizes"]["64"]
    assert len(found["rounds"]) == 2
    for one in found["rounds"]:
        assert {"fast", "exact"} <= set(one)
        for side in one.values():
            assert side["images"] == 16
            assert side["seconds"] > 0
    assert ("open_clip" in found["problems"]) != ("open_clip" in found["rounds"][0])
    if found["problems"]:
        assert "open_clip does not run in this environment (" in output
    for mode in ("fast", "exact"):
        assert f"stages, shortest side 64, --decode {mode}" in output
        assert found["stages"][mode]["batch"]["images"] == 16
    assert found["pixels"]["mean"] < 20
    assert output.count("| tar read |") == 2


def test_ratios_are_taken_within_rounds() -> None:
    rounds = [
        {
            "fast": {"images": 10, "seconds": 1.0, "worker_cpu": 0.5},
            "open_clip": {"images": 10, "seconds": 3.0, "worker_cpu": 2.0},
        },
        {
            "fast": {"images": 10, "seconds": 4.0, "worker_cpu": 0.5},
            "open_clip": {"images": 20, "seconds": 8.0, "worker_cpu": 2.0},
        },
    ]
    assert loader.ratios(rounds, "fast") == pytest.approx([3.0, 1.0])
    assert loader.ratios(rounds, "fast", "worker_cpu") == pytest.approx([4.0, 2.0])
    assert loader.rates(rounds, "fast") == pytest.approx([10.0, 2.5])
    row = loader.side_rows(64, {"rounds": rounds})[0]
    assert row[:2] == ["64", "fast"]
    assert row[4].startswith("2.00")


def test_a_side_that_does_not_start_is_a_problem_and_no_hang() -> None:
    side = loader.Side("open_clip", "false", {})
    side.close()
    assert side.problem == "the process of open_clip ended"


def test_shards_are_a_function_of_the_seed(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        found = photo_shards.write_photo_shards(tmp_path / folder, 48, samples=5, shards=2, seed=seed)
    contents = {folder: (tmp_path / folder / "00001.tar").read_bytes() for folder in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]
    assert json.loads((tmp_path / "a" / "sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 3}
    with tarfile.open(tmp_path / "c" / "00001.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    picture = Image.open(BytesIO(members["000000002.jpg"]))
    assert min(picture.size) == 48
    assert 8 <= len(members["000000002.txt"].decode().split()) <= 16
    assert found["mean_bytes"] > 500
