"""Runs that differ in nothing but their seed belong together; what else they differ in is told."""

from __future__ import annotations

import difflib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from evaluation.comparison.runs import GLOBAL_BATCH, Run
from evaluation.errors import UserError

SEED = "seed"
# Where a metric lies in training is compared to this many digits of an epoch.
_DIGITS = 6

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
        by: flags, or global_batch, to label and to order the groups by; without them groups are called after their runs.

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
        asked, found = (", ".join(map(in_words, flags)) for flags in (by, others))
        notes.append(f"besides {asked} the runs differ in {found}; none of them are pooled.")
    if repeated:
        notes.append(f"{', '.join(repeated)}: same flags and seed as another run; kept apart.")
    return groups, notes


def in_words(flag: str) -> str:
    """What people read for a flag or for the global batch, which is no flag."""
    return "global batch" if flag == GLOBAL_BATCH else flag


def unfinished(runs: Sequence[Run]) -> list[str]:
    """One line for each run that has not come to its end."""
    return [
        f"{run.name} stands at epoch {run.reached:.3g} of {run.planned:g}."
        for run in runs
        if run.reached + 1e-6 < run.planned
    ]


def final(group: Group, metric: str) -> Statistic | None:
    """The runs' values of a metric at the last epoch that all of them have it of; None if there is no such epoch."""
    values = [_by_epoch(run, metric) for run in group.runs]
    epoch = _last_shared(values)
    return None if epoch is None else statistic([by_epoch[epoch] for by_epoch in values])


def uneven(groups: Sequence[Group], metrics: Sequence[str]) -> list[str]:
    """One line for each metric of a group whose runs do not have the same last epoch of it, and for each metric of which the
    groups' last epochs are one or more apart."""
    notes = []
    for metric in metrics:
        ends = {}
        for group in groups:
            values = [_by_epoch(run, metric) for run in group.runs]
            epoch = _last_shared(values)
            if epoch is not None:
                ends[group.label] = epoch
            further = [
                f"{run.name} epoch {max(by_epoch):.6g}"
                for run, by_epoch in zip(group.runs, values)
                if by_epoch and max(by_epoch) != epoch
            ]
            if all(values) and further:
                taken = "has no epoch in common" if epoch is None else f"is taken at epoch {epoch:.6g}, the last of all"
                notes.append(f"{metric} of {group.label} {taken}; {', '.join(further)}.")
        if ends and max(ends.values()) - min(ends.values()) >= 1:
            places = ", ".join(f"{name} epoch {epoch:.6g}" for name, epoch in ends.items())
            notes.append(f"{metric} is not of one epoch: {places}.")
    return notes


def _by_epoch(run: Run, metric: str) -> dict[float, float]:
    epochs, values = run.points(metric, "epoch")
    return dict(zip((round(epoch, _DIGITS) for epoch in epochs), values))


def _last_shared(values: Sequence[dict[float, float]]) -> float | None:
    return max(set(values[0]).intersection(*values[1:]), default=None)


def statistic(values: Sequence[float]) -> Statistic:
    """Of at least one value."""
    return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _check_flag(flag: str, runs: Sequence[Run]) -> None:
    known = sorted({name for run in runs for name in run.facts})
    if flag not in known:
        close = difflib.get_close_matches(flag, known, n=3)
        remedy = (
            f"did you mean {' or '.join(close)}?"
            if close
            else "give a name of params.txt, such as npn_restart_iter, or global_batch."
        )
        raise UserError(f"--by {flag}: no run has such a flag; {remedy}")


def _compared_flags(runs: Sequence[Run], by: Sequence[str]) -> list[str]:
    """All facts in which runs of one group must agree, those asked for first."""
    names = sorted({name for run in runs for name in run.facts} - BOOKKEEPING - {SEED} - set(by))
    return [*by, *names]


def _text(run: Run, flag: str) -> str:
    # A flag that an older run did not have is not the same as None.
    return repr(run.facts[flag]) if flag in run.facts else ""


def _labelled(members: list[list[Run]], by: Sequence[str]) -> list[Group]:
    stems = _distinct([_stem([run.name for run in runs]) for runs in members])
    values = [tuple(runs[0].facts.get(flag) for flag in by) for runs in members]
    groups = []
    for runs, stem, own in zip(members, stems, values):
        words = ", ".join(f"{in_words(flag)} {value}" for flag, value in zip(by, own))
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
