"""The benchmark of the NPN runs on one rank and on two, alone and as one of several, and counts what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = "--device cpu --batch 32 --prototypes 16 --dim 8 --updates 2 --repeats 3 --warmup 2"


def run(line: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What went to the JSON file, and what was printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "npn_step.py"), "--json", str(folder / "found.json")]
    done = subprocess.run(
        [*command, *TINY.split(), *line.split()],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text()), done.stdout


@pytest.mark.parametrize(("line", "ranks"), [("", 1), ("--ranks 2", 2), ("--one-of 4 --flags=--npn_lr=0.1", 1)])
def test_every_part_is_measured_for_every_precision(line: str, ranks: int, tmp_path: Path) -> None:
    found, printed = run(line, tmp_path)
    assert len(found["ranks"]) == ranks
    for rank in found["ranks"]:
        assert rank["milliseconds"].keys() == {"fp32", "bf16"}
        for parts in rank["milliseconds"].values():
            assert parts.keys() == {"restart", "updates", "prediction"}
            assert all(len(values) == 3 and min(values) > 0 for values in parts.values())
        assert rank["alpha_gap_rms"]["fp32"] == 0.0
        # Eight bits of mantissa are seen, and no more than that.
        assert 1e-6 < rank["alpha_gap_rms"]["bf16"] <= rank["alpha_gap_max"]["bf16"] < 0.3
    assert [row.split(" | ")[0] for row in printed.splitlines()[-2:]] == ["| fp32", "| bf16"]


def test_one_of_several_works_on_its_share_only(tmp_path: Path) -> None:
    alone, _ = run("--prototypes 4", tmp_path)
    share, _ = run("--one-of 4", tmp_path)
    assert alone["ranks"][0]["alpha_gap_max"] == share["ranks"][0]["alpha_gap_max"]
