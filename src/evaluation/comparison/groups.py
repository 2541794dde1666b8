"""Runs that differ in nothing but their seed belong together; what else they differ in is told."""

from __future__ import annotations

import difflib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from evaluation.comparison.runs import Run
from evaluation.errors import UserError

SEED = "seed"

# Flags that change where and how a run works, but not what it learns; and those that only repeat another one.
BOOKKEEPING = frozenset(
    (
        *("name", "logs", "resume", "report_to", "wandb_project_name", "wandb_notes", "debug", "profile"),
        *("log_every_n_steps", "val_frequency", "zeroshot_frequency", "eval_timeout"),
        *("save_frequency", "save_every_n_steps", "save_every_minutes", "save_most_recent", "save_in_background"),
        *("strict_save", "keep_last", "delete_previous_checkpoint", "remote_sync", "requeue_on_signal", "max_hours"),
        *("device", "dist_backend", "dist_url", "dist_timeout", "data_timeout", "workers", "cache_dir"),
        *("siglip", "fastclip", "npn", "amorlip"),
    )
)


@dataclass(frozen=True)
class Group:
    """Runs of the same flags, one per seed.

    Attributes:
        label: for a legend, without the number of seeds.
        values: of the flags that were asked for, in their order.
    """

    label: str
    values: tuple[Any, ...]
    runs: tuple[Run, ...]


class Statistic(NamedTuple):
    """Mean, and standard deviation (of a sample: n − 1) of at least two values."""

    mean: float
    std: float | None


def group_runs(runs: Sequence[Run], by: Sequence[str] = ()) -> tuple[list[Group], list[str]]:
    """Put runs together that differ in their seed only.

    Args:
        by: flags to label and to order the groups by; without them groups are called after their runs.

    Returns:
        The groups, and lines to tell the user: flags besides `by` that differ, runs that repeat another one.

    Raises:
        UserError: no run has such a flag.
    """
    for flag in by:
        _check_flag(flag, runs)
    compared = _compared_flags(runs, by)
    members: dict[tuple[str, ...], list[Run]] = {}
    repeated = []
    for run in runs:
        key = tuple(_text(run, flag) for flag in compared)
        copy = 0
        # The same seed twice is no second seed.
        while any(_text(run, SEED) == _text(other, SEED) for other in members.get((*key, str(copy)), ())):
            copy += 1
        if copy:
            repeated.append(run.name)
        members.setdefault((*key, str(copy)), []).append(run)
    groups = _labelled(list(members.values()), by)
    notes = []
    others = [flag for flag in compared if flag not in by and len({_text(run, flag) for run in runs}) > 1]
    if by and others:
        notes.append(f"besides {', '.join(by)} the runs differ in {', '.join(others)}; none of them are pooled.")
    if repeated:
        notes.append(f"{', '.join(repeated)}: same flags and seed as another run; kept apart.")
    return groups, notes


def unfinished(runs: Sequence[Run]) -> list[str]:
    """One line for each run that has not come to its end."""
    return [
        f"{run.name} stands at epoch {run.reached:.3g} of {run.planned:g}."
        for run in runs
        if run.reached + 1e-6 < run.planned
    ]


def final(group: Group, metric: str) -> Statistic | None:
    """The runs' last values of a metric; None if one of them has none."""
    values = [run.points(metric, "epoch")[1] for run in group.runs]
    return statistic([points[-1] for points in values]) if all(values) else None


def statistic(values: Sequence[float]) -> Statistic:
    """Of at least one value."""
    return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _check_flag(flag: str, runs: Sequence[Run]) -> None:
    known = sorted({name for run in runs for name in run.params})
    if flag not in known:
        close = difflib.get_close_matches(flag, known, n=3)
        remedy = (
            f"did you mean {' or '.join(close)}?" if close else "give a name of params.txt, such as npn_restart_iter."
        )
        raise UserError(f"--by {flag}: no run has such a flag; {remedy}")


def _compared_flags(runs: Sequence[Run], by: Sequence[str]) -> list[str]:
    """All flags in which runs of one group must agree, those asked for first."""
    names = sorted({name for run in runs for name in run.params} - BOOKKEEPING - {SEED} - set(by))
    return [*by, *names]


def _text(run: Run, flag: str) -> str:
    # A flag that an older run did not have is not the same as None.
    return repr(run.params[flag]) if flag in run.params else ""


def _labelled(members: list[list[Run]], by: Sequence[str]) -> list[Group]:
    stems = _distinct([_stem([run.name for run in runs]) for runs in members])
    values = [tuple(runs[0].params.get(flag) for flag in by) for runs in members]
    groups = []
    for runs, stem, own in zip(members, stems, values):
        words = ", ".join(f"{flag} {value}" for flag, value in zip(by, own))
        is_alone = sum(other == own for other in values) == 1
        label = stem if not by else words if is_alone else f"{words} ({stem})"
        groups.append(Group(label, own, tuple(runs)))
    return sorted(groups, key=lambda group: [_order(value) for value in group.values])


def _order(value: Any) -> tuple[int, float, str]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if is_number else (1, 0.0, str(value))


def _stem(names: list[str]) -> str:
    """What the names of a group's runs have in common, without the part that counts seeds."""
    if len(names) == 1:
        return names[0]
    shared = next((i for i, letters in enumerate(zip(*names)) if len(set(letters)) > 1), min(map(len, names)))
    return re.sub(r"[-_.=]+(seed|s)?\d*$", "", names[0][:shared]) or names[0]


def _distinct(stems: list[str]) -> list[str]:
    return [stem if stems.count(stem) == 1 else f"{stem} #{stems[:i].count(stem) + 1}" for i, stem in enumerate(stems)]
