"""What the normalizers cost: their time per step beside that of the whole step (Table 5 of arXiv 2511.08417)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation.comparison.runs import Run
from evaluation.comparison.tables import Cell, Column, Table
from evaluation.errors import UserError
from evaluation.records import series

COLUMNS = [
    Column("run", "run"),
    Column("objective", "objective"),
    Column("normalizer_seconds", "NPN, ms/step", ".2f", 1000.0),
    Column("objective_seconds", "loss with NPN, ms/step", ".2f", 1000.0),
    Column("seconds_per_step", "step, ms", ".2f", 1000.0),
    Column("normalizer_share", "NPN, % of the step", ".2f", 100.0),
    Column("steps", "steps", ".10g"),
]


class StepTimes(NamedTuple):
    """Medians over steps, in seconds; `normalizer` is None for an objective without normalizers. steps: how many."""

    normalizer: float | None
    objective: float
    total: float
    steps: int


def step_times(run: Run, skip_steps: int) -> StepTimes:
    """A run's own times. All steps of a logging interval count with the interval's mean.

    Args:
        skip_steps: steps at the beginning that do not count: compiling, recording, filling caches.

    Raises:
        UserError: the run has no times, or none after those steps.
    """
    file = run.path / "metrics.jsonl"
    steps, totals = series(run.training, "step", "seconds_per_step")
    timed_at, objectives = series(run.training, "step", "objective_seconds")
    if not timed_at:
        raise UserError(
            f"{file} has no objective_seconds: the run did not time itself; leave it out or train it again."
        )
    by_step = dict(zip(timed_at, objectives))
    normalizers = dict(zip(*series(run.training, "step", "normalizer_seconds")))
    rows, counts = [], []
    for before, step, total in zip([steps[0] - 1, *steps], steps, totals):
        if before >= skip_steps and step in by_step:
            rows.append((normalizers.get(step, np.nan), by_step[step], total))
            counts.append(int(step - before))
    if not rows:
        raise UserError(
            f"{file} has no interval after --skip-steps {skip_steps}, it ends at {steps[-1]:g}: skip fewer."
        )
    normalizer, objective, total = np.median(np.repeat(rows, counts, axis=0), axis=0).tolist()
    return StepTimes(normalizer if normalizers else None, objective, total, sum(counts))


def time_table(runs: Sequence[Run], skip_steps: int) -> Table:
    """A row per run."""
    rows = []
    for run in runs:
        times = step_times(run, skip_steps)
        share = None if times.normalizer is None else times.normalizer / times.total
        numbers = (times.normalizer, times.objective, times.total, share, times.steps)
        rows.append([Cell(run.name), Cell(str(run.params.get("objective") or "")), *map(Cell, numbers)])
    return Table(COLUMNS, rows)
