"""What is published of the runs: figures and flags, without checkpoints, in folders that the other parts take for runs."""

from __future__ import annotations

from pathlib import Path

from evaluation.run_folder import RunFolder
from evaluation.whole_files import write_whole
from study.measure import ERRORS, FILE
from study.report import CHOICES
from study.runs import Setup
from study.training import has_ended

_FILES = ("params.txt", "results.jsonl", FILE, ERRORS)
# A line per logging interval, which is most of what a run writes; of the others no curve is drawn and no time is shown.
_CURVES = "metrics.jsonl"
_WITHOUT_CURVES = ("tune-", "ablation-", "memory-")


def publish(setup: Setup, folder: Path) -> list[str]:
    """Copy the records of all finished runs, and what tuning has chosen, with paths as in the study's own commands.

    Returns:
        The runs' names.
    """
    runs = [RunFolder(path.parent) for path in sorted(setup.logs.glob("*/params.txt"))]
    names = [run.name for run in runs if has_ended(run.path, run.params["epochs"])]
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in _FILES if name.startswith(_WITHOUT_CURVES) else (*_FILES, _CURVES):
            _copy(setup, setup.logs / name / file, folder / name / file)
    _copy(setup, setup.logs / CHOICES, folder / CHOICES)
    return names


def _copy(setup: Setup, source: Path, target: Path) -> None:
    if source.exists():
        text = source.read_text(encoding="utf-8")
        for path, public in ((setup.logs, "logs/study"), (setup.data, "data/study")):
            text = text.replace(str(path), public)
        write_whole(target, text)
