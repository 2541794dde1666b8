"""Trains the runs of a stage; what is finished is not done again, what was interrupted goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.records import read_records
from study.errors import StudyError
from study.lanes import Job, work_off
from study.runs import Run
from training.params import parse_args

# A change of these leaves a run the same. The precision is the machine's, and a run may be measured on another one.
_FREE = frozenset(
    {"logs", "resume", "model_config", "precision", "workers", "log_every_n_steps"}
    | {"save_every_minutes", "save_frequency", "keep_last"}
)
# Of these only the last part counts: data may be moved.
_PATHS = frozenset({"train_data", "val_data", "zeroshot_data"})


def train_all(runs: Sequence[Run], logs: Path, lanes: int) -> None:
    """Train those runs that are not finished, so many at a time.

    Raises:
        StudyError: a run's folder holds another run, or runs have failed (the others have been trained all the same).
    """
    due = [run for run in runs if not is_finished(run, logs)]
    print(f"{len(runs)} runs, {len(runs) - len(due)} of them finished before", flush=True)
    work_off(
        [Job(run.name, ("src/training/main.py", *run.command()), logs / "output" / f"{run.name}.txt") for run in due],
        lanes,
    )


def is_finished(run: Run, logs: Path) -> bool:
    """Whether a run has been trained and evaluated to its last epoch.

    Raises:
        StudyError: its folder holds another run.
    """
    folder = logs / run.name
    if (folder / "params.txt").exists():
        _check_same(run, folder)
    return has_ended(folder, run.epochs)


def has_ended(folder: Path, epochs: int) -> bool:
    """Whether the last evaluation in a run's folder is that of its last epoch."""
    results = read_records(folder / "results.jsonl")
    return bool(results) and results[-1].get("epoch") == epochs


def _check_same(run: Run, folder: Path) -> None:
    """Compare every flag, also those that a run leaves at their defaults; what an older version did not know is left out."""
    lines = (folder / "params.txt").read_text(encoding="utf-8").splitlines()
    params = dict(line.split(": ", 1) for line in lines if ": " in line)
    for flag, value in vars(parse_args(run.command())).items():
        asked, had = str(value), params.get(flag, str(value))
        if flag not in _FREE and _comparable(flag, asked) != _comparable(flag, had):
            raise StudyError(
                f"{folder} was trained with {flag} {had}, not {asked}: move it away or choose another --logs"
            )


def _comparable(flag: str, text: str) -> float | str:
    """1e-06 and 0.000001 are one value."""
    if flag in _PATHS:
        return Path(text).name
    try:
        return float(text)
    except ValueError:
        return text
