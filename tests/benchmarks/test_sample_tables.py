"""The benchmark of the per-sample tables allocates what it claims, and says what it did not measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(flags: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "sample_tables.py"), *flags.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_sample_tables(tmp_path: Path) -> None:
    lines = tmp_path / "found.jsonl"
    printed = run(f"--rows 4e6 --batch 64 --steps 3 --device cpu --json {lines}")
    found = {(line["version"], line["rows"]): line for line in map(json.loads, lines.read_text().splitlines())}
    assert set(found) == {("v0, v1, v3", 4_000_000), ("v2", 4_000_000)}
    for (version, rows), line in found.items():
        columns = 8 if version == "v2" else 2
        assert line["table_gib"] == pytest.approx(rows * columns * 4 / 2**30)
        # It allocates what it claims.
        assert line["resident_gib"] == pytest.approx(line["table_gib"], rel=0.2)
    assert "4,000,000" in printed


def test_what_does_not_fit_is_not_measured() -> None:
    assert "not measured: more than the free memory" in run("--rows 1e13 --device cpu")
