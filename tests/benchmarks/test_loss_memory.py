"""The benchmark of the losses' memory measures, skips what would not fit, and makes up no number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import loss_memory  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks on the CPU need Linux")

MIB = 2**20


def run(line: str) -> tuple[list[dict[str, Any]], str]:
    """The lines of JSON and the whole output."""
    command = [sys.executable, str(ROOT / "benchmarks" / "loss_memory.py"), "--device", "cpu", *line.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stdout


def test_a_dense_loss_needs_its_blocks_and_a_chunked_one_does_not() -> None:
    """N = 2048: one block of all pairs is 16 MiB, a chunk of 64 rows half a MiB."""
    found, output = run("--objectives siglip --sizes 2048 --chunk 64 --dim 16 --steps 1")
    dense, chunked = found
    assert (dense["chunk"], chunked["chunk"]) == (None, 64)
    # Logits, labels and what log sigmoid keeps, at least; and no more than a few of them.
    assert 3 * 16 * MIB < dense["peak_bytes"] < 10 * 16 * MIB
    assert 0 < chunked["peak_bytes"] < 16 * MIB
    assert all(line["seconds"]["median"] > 0 and line["note"] == "" for line in found)
    rows = [line.split(" | ") for line in output.splitlines() if line.startswith("| siglip")]
    assert [row[1] for row in rows] == ["default", "64"]
    assert f"{dense['peak_bytes'] / MIB:.1f} MiB / " in rows[0][2]


def case(expected_bytes: int) -> loss_memory.Case:
    return loss_memory.Case("siglip", 8, 64, 16, "cpu", 1, "", expected_bytes)


def test_what_would_not_fit_is_skipped_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_memory, "step", lambda *_: pytest.fail("was run"))
    free = loss_memory.free_bytes("cpu")
    assert free > 0
    result = loss_memory.measure(case(2 * free))
    assert (result.peak_bytes, result.seconds) == (None, None)
    assert result.note.startswith("skipped: expected ")
    assert result.note in loss_memory.table({("siglip", 8): {64: result}}, [64])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_running_out_of_memory_is_told_without_a_number(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_after_the_warm_up(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise error

    monkeypatch.setattr(loss_memory, "step", fail_after_the_warm_up)
    result = loss_memory.measure(case(0))
    assert (result.peak_bytes, result.seconds) == (None, None)
    assert result.note.startswith("failed: out of memory")


def test_any_other_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(loss_memory, "step", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        loss_memory.measure(case(0))


@pytest.mark.parametrize(
    ("size", "chunk", "measured", "expected"),
    [
        (1000, None, [], 6 * 1000 * 1000 * 4),
        (1000, 10, [], 6 * 10 * 1000 * 4),
        (10, 1000, [], 6 * 10 * 10 * 4),
        (2000, None, [(1000, 50)], 200),
        (4000, None, [(1000, 50), (2000, 100)], 200),
        (4000, None, [(1000, 50), (2000, 200)], 800),
        (4000, None, [(1000, 50), (2000, 900)], 3600),
        (4000, None, [(1000, 50), (2000, 40)], 80),
    ],
)
def test_the_expected_peak_grows_as_measured_but_between_linearly_and_quadratically(
    size: int, chunk: int | None, measured: list[tuple[int, int]], expected: int
) -> None:
    assert loss_memory.expected_bytes(size, chunk, measured) == expected


@pytest.mark.parametrize("words", ["--objectives nothing", "--sizes 1,64", "--chunk 0", "--steps 0", "--sizes many"])
def test_mistakes_are_told(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loss_memory.parse_args(["--device", "cpu", *words.split()])
    assert words.split()[0] in capsys.readouterr().err
