"""Runs as their folders tell of them: flags, and numbers over training."""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.errors import UserError, one_line
from evaluation.records import Record, read_records, series
from evaluation.run_folder import RunFolder

# Among a run's facts, beside the flags: params.txt tells the batch of a process, but not how many there were.
GLOBAL_BATCH = "global_batch"

Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: its folder's name, or the path where two runs share a name.
        params: flag → value, as params.txt has them.
        training: the lines of metrics.jsonl.
        validation: the lines of results.jsonl, and of every evaluated epoch {"epoch": N, name of an aggregate: value}.
    """

    name: str
    path: Path
    params: dict[str, Any]
    training: list[Record]
    validation: list[Record]

    def has(self, metric: str) -> bool:
        """Whether there is a number of that name."""
        return bool(self.points(metric, "epoch")[0])

    def points(self, metric: str, x: str) -> Points:
        """The metric over x, in the order of x; two empty lists if the run does not have it.

        Args:
            x: samples, step or epoch.

        Raises:
            UserError: a validation metric cannot be placed, because metrics.jsonl does not tell x.
        """
        if any(metric in record for record in self.training):
            return series(self.training, x, metric)
        epochs, values = series(self.validation, "epoch", metric)
        return (epochs if x == "epoch" or not epochs else self._at_epochs(epochs, x)), values

    def names(self) -> tuple[set[str], set[str]]:
        """What training and validation have told of."""
        training, validation = (
            {name for record in part for name in record} for part in (self.training, self.validation)
        )
        return training, validation

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The flags, and `global_batch`: the samples of a step, if metrics.jsonl tells them."""
        steps, samples = series(self.training, "step", "samples")
        return {**self.params, GLOBAL_BATCH: round(samples[-1] / steps[-1])} if steps and steps[-1] else self.params

    @property
    def reached(self) -> float:
        """Epochs of training so far, by the last line of metrics.jsonl or results.jsonl; 0 if they do not say."""
        return max(series((*self.training, *self.validation), "epoch", "epoch")[0], default=0.0)

    @property
    def planned(self) -> float:
        """Epochs it was to train for; 0 if params.txt does not say."""
        return float(self.params.get("stop_epochs") or self.params.get("epochs") or 0)

    def _at_epochs(self, epochs: list[float], x: str) -> list[float]:
        known, places = series(self.training, "epoch", x)
        if not known:
            raise UserError(f"{self.path / 'metrics.jsonl'} tells no {x} of an epoch: give --x epoch.")
        per_epoch = places[-1] / known[-1]
        inside = np.interp(epochs, [0.0, *known], [0.0, *places])
        # Lines may be missing at the end, when a disk was full.
        return [float(at) if epoch <= known[-1] else epoch * per_epoch for epoch, at in zip(epochs, inside)]


def open_runs(patterns: Sequence[str]) -> list[Run]:
    """The runs of folders and glob patterns, each once, in the order given and by number within a pattern.

    Raises:
        UserError: a folder is no run, a pattern matches none, a file cannot be read or has no line.
    """
    folders: dict[Path, RunFolder] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            folders.setdefault(path.resolve(), _opened(path))
    counts = Counter(folder.name for folder in folders.values())
    return [_read(folder, folder.name if counts[folder.name] == 1 else str(folder.path)) for folder in folders.values()]


def _matches(pattern: str) -> list[Path]:
    if Path(pattern).is_dir() or not glob.has_magic(pattern):
        return [Path(pattern)]
    # Other folders may lie beside the runs.
    found = [Path(path) for path in glob.glob(pattern) if (Path(path) / "params.txt").is_file()]
    if not found:
        raise UserError(f"{pattern}: no run folder (with params.txt) matches; give logs/NAME or 'logs/PATTERN*'.")
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _opened(path: Path) -> RunFolder:
    try:
        return RunFolder(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path / 'params.txt'} cannot be read ({_reason(error)}); leave the run out.") from None


def _read(folder: RunFolder, name: str) -> Run:
    files = [folder.path / file for file in ("metrics.jsonl", "results.jsonl")]
    try:
        training, validation = map(read_records, files)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({_reason(error)}); leave the run out.") from None
    validation = [*validation, *_aggregates(folder.path / "eval_results")]
    if not training and not validation:
        raise UserError(f"{files[0]} and results.jsonl have no line: {name} has told nothing yet; leave the run out.")
    return Run(name, folder.path, folder.params, training, validation)


def _aggregates(folder: Path) -> Iterable[Record]:
    """{"epoch": N, name: value} of every epoch_N_summary.json."""
    for path in sorted(folder.glob("epoch_*_summary.json"), key=_by_number):
        match = re.fullmatch(r"epoch_(\d+)_summary\.json", path.name)
        if not match:
            continue
        try:
            aggregates = json.loads(path.read_text(encoding="utf-8"))["aggregates"]
            values = {name: aggregate["value"] for name, aggregate in aggregates.items()}
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({_reason(error)}); evaluate that epoch again.") from None
        yield {"epoch": int(match[1]), **values}


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return str(error.strerror)
    if isinstance(error, KeyError):
        return f"no {error}"
    return one_line(error)
