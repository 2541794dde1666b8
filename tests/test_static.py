"""Linters and type checker pass, and every shell script can be read by bash."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELL_SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "scripts").rglob("*.sbatch"), ROOT / ".ci" / "run"])


def _run(*words: str) -> None:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("words", ["ruff check --no-cache .", "ruff format --check --no-cache .", "mypy"])
def test_python(words: str) -> None:
    _run(sys.executable, "-m", *words.split())


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_script(script: Path) -> None:
    _run("bash", "-n", str(script))


def test_scripts_are_executable() -> None:
    """All but those that others source, and those that sbatch reads."""
    for script in SHELL_SCRIPTS:
        with open(script, encoding="utf-8") as file:
            if file.readline().startswith("#!") and script.suffix != ".sbatch":
                assert script.stat().st_mode & 0o111, script


BATCH_JOBS = [path for path in SHELL_SCRIPTS if path.suffix == ".sbatch"]


@pytest.mark.parametrize("script", BATCH_JOBS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_batch_jobs_live_through_interruptions(script: Path) -> None:
    """What `train`, `evaluate` and `restartable` of common.sh rely on; these lines cannot be sourced."""
    text = script.read_text(encoding="utf-8")
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert {"--open-mode=append", "--requeue"} <= asked
    assert re.search(r"^source .*/scripts/slurm/(\w+/)?common\.sh\"", text, re.MULTILINE)
    started = [
        line.split()[0] for line in text.splitlines() if line.startswith(("train ", "evaluate ", "restartable "))
    ]
    if started == ["train"]:
        # The ranks save before they end; under the same name the next start finds what they saved.
        assert "--signal=USR1@300" in asked
        assert "--name " in text
    else:
        # An evaluation has nothing to save: its results are written as they come.
        assert started in (["evaluate"], ["restartable"])
        assert "--signal=B:USR1@120" in asked
        assert "--train_output_dir " in text
