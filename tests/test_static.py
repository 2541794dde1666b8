"""Linters and type checker pass, and every shell script can be read by bash."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "script", [path for path in SHELL_SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.stem
)
def test_batch_jobs_live_through_interruptions(script: Path) -> None:
    """What `train` of common.sh relies on; these lines cannot be sourced."""
    text = script.read_text(encoding="utf-8")
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert {"--open-mode=append", "--signal=USR1@300", "--requeue"} <= asked
    assert "scripts/slurm/common.sh" in text
    assert "--name " in text
