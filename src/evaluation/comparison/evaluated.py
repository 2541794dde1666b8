"""Runs grouped over seeds, and the mean and standard deviation of each result over a row; what does not compare is said."""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.comparison.groups import BOOKKEEPING, SEED, Statistic, statistic
from evaluation.comparison.tables import Cell, Column, Table, with_best
from evaluation.datacomp.aggregate import GROUPS, aggregates, main_metrics
from evaluation.datacomp.results import read_results
from evaluation.datacomp.tasks import TASKS
from evaluation.errors import UserError
from evaluation.report import ROWS
from evaluation.run_folder import parse_params

HEADLINES = ("retrieval/image_to_text_R@1", "retrieval/text_to_image_R@1", "zeroshot/top1")

# Flags in which runs of one row may differ.
_FREE = BOOKKEEPING | {SEED}


# What was counted, and how many; None where the file does not say.
Count = tuple[str, int | None]


@dataclass(frozen=True)
class Measure:
    """A column of the table: its name, a key of `Evaluated.values`, and which end is good."""

    name: str
    key: str
    lower_is_better: bool = False


@dataclass
class Evaluated:
    """The results of one run.

    Attributes:
        name: its folder's name.
        params: what params.txt says; empty without one.
        values: column key → number, of what is there.
        missing: column key → tasks without which an aggregate has no value.
        data: column key → how much data the value comes from: names and numbers of images, pairs, classes.
        notes: column key → in what other way the value came about: epoch, precision.
    """

    name: str
    params: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    data: dict[str, list[Count]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    """Runs that are averaged: a row of the table."""

    label: str
    runs: list[Evaluated]

    def having(self, measure: Measure) -> list[Evaluated]:
        """The runs with a number in a column."""
        return [run for run in self.runs if measure.key in run.values]

    def statistic(self, measure: Measure) -> Statistic | None:
        """Mean and standard deviation over the runs that have a number; None if none has."""
        values = [run.values[measure.key] for run in self.having(measure)]
        return statistic(values) if values else None


@dataclass
class Comparison:
    """Rows, columns, which columns hold numbers of different data, and what has to be said under the table."""

    rows: list[Row]
    columns: list[Measure]
    mixed: set[str]
    notes: list[str]

    def table(self) -> Table:
        """As a table: the best of a column is marked where its numbers compare, means of all runs of a row."""
        columns = [Column("run", "run"), Column("runs", "n", "g")]
        parts = [[Cell(row.label) for row in self.rows], [Cell(len(row.runs)) for row in self.rows]]
        for measure in self.columns:
            mark = " *" if measure.key in self.mixed else ""
            unit = "" if measure.lower_is_better else ", %"
            columns.append(
                Column(measure.key, f"{measure.name}{unit}{mark}", ".2f", 1.0 if measure.lower_is_better else 100.0)
            )
            found = [row.statistic(measure) for row in self.rows]
            cells = [Cell(None) if each is None else Cell(each.mean, each.std) for each in found]
            comparable = measure.key not in self.mixed and not any(self._partial(row, measure) for row in self.rows)
            parts.append(with_best(cells, not measure.lower_is_better if comparable else None))
        return Table(columns, [list(row) for row in zip(*parts)])

    @staticmethod
    def _partial(row: Row, measure: Measure) -> bool:
        return 0 < len(row.having(measure)) < len(row.runs)


def expanded(patterns: Sequence[str]) -> list[Path]:
    """Run folders of names and patterns, each once.

    Raises:
        UserError: for one that names no folder.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        folders = [Path(pattern)] if Path(pattern).is_dir() else [Path(path) for path in sorted(glob.glob(pattern))]
        folders = [folder for folder in folders if folder.is_dir()]
        if not folders:
            raise UserError(f"{pattern} names no run folder; give logs/NAME, or a pattern in quotes.")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_run(folder: Path, epoch: int | None) -> Evaluated:
    """Read what was evaluated of a run: DataComp's tasks and held-out sets, of one epoch or of the newest evaluated.

    Raises:
        UserError: if there is nothing, or a file cannot be understood.
    """
    params = folder / "params.txt"
    run = Evaluated(folder.resolve().name, parse_params(params.read_text(encoding="utf-8")) if params.is_file() else {})
    results = _results_file(folder, epoch)
    if results is not None:
        _add_datacomp(run, results)
    _add_held_out(run, folder / "evaluation.json", epoch)
    if not run.values:
        wanted = f" of epoch {epoch}" if epoch is not None else ""
        raise UserError(
            f"{folder} has no evaluation{wanted}; run src/evaluation/main.py --train_output_dir {folder} first."
        )
    return run


def _results_file(folder: Path, epoch: int | None) -> Path | None:
    found = {}
    for path in (folder / "eval_results").glob("*_eval_results.jsonl"):
        match = re.fullmatch(r"(epoch|iter)_([0-9]+)_eval_results\.jsonl", path.name)
        if match and (epoch is None or (match[1], int(match[2])) == ("epoch", epoch)):
            found[match[1] == "epoch", int(match[2])] = path
    return found[max(found)] if found else None


def _add_datacomp(run: Evaluated, path: Path) -> None:
    lines = {line["key"]: line for line in read_results(path)}
    digests = {line.get("checkpoint_sha256") for line in lines.values()}
    if len(digests) > 1:
        raise UserError(f"{path} holds results of several checkpoints; run src/evaluation/main.py on the run again.")
    tasks = main_metrics(lines.values())
    when = path.name.removesuffix("_eval_results.jsonl").replace("_", " ")

    def add(name: str, value: float, keys: Iterable[str]) -> None:
        run.values[name] = value
        used = [lines[key] for key in keys]
        run.data[name] = [(line["key"], line.get("images")) for line in used]
        precisions = sorted({str(line.get("precision") or "of the public code") for line in used})
        run.notes[name] = f"{when}, {' and '.join(precisions)}"

    for key, value in tasks.items():
        add(key, value, [key])
    for name, (value, keys, missing) in aggregates(tasks).items():
        if value is not None:
            add(name, value, keys)
        else:
            run.missing[name] = missing


def _add_held_out(run: Evaluated, path: Path, epoch: int | None) -> None:
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metrics, counts, at = content["metrics"], content["counts"], content["checkpoint"]["epoch"]
        metrics = {name: float(metrics[name]) for name in ROWS if metrics.get(name) is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be understood ({error!r}); run src/evaluation/main.py again.") from None
    if epoch is not None and at != epoch:
        return
    for name, value in metrics.items():
        prefix = "zeroshot" if name.startswith("zeroshot/") else "pairs"
        run.values[name] = value
        run.data[name] = sorted(
            (key, count) for key, count in counts.items() if key.startswith("zeroshot") == (prefix == "zeroshot")
        )
        run.notes[name] = f"epoch {at}, {content.get('precision', 'fp32')}"


def grouped(runs: Sequence[Evaluated], by: str) -> list[Row]:
    """Groups of runs in the order in which they first come.

    Args:
        by: `seed` (runs whose params.txt differ in the seed only, circumstances such as the number of loader processes left
            aside), `objective` (runs of one objective), or `name-without-seed` (runs whose names differ in seed… or s… only).
    """
    key: Callable[[Evaluated], object] = {
        "seed": lambda run: sorted((k, repr(v)) for k, v in run.params.items() if k not in _FREE) or run.name,
        "objective": lambda run: str(run.params.get("objective") or run.name),
        "name-without-seed": lambda run: name_without_seed(run.name),
    }[by]
    members: dict[str, list[Evaluated]] = {}
    for run in runs:
        members.setdefault(repr(key(run)), []).append(run)
    return [Row(_label(found, by), found) for found in members.values()]


def name_without_seed(name: str) -> str:
    """`neuclip-seed3-b256` → `neuclip-b256`."""
    return re.sub(r"(^|[-_.])(seed|s)[-_=]?\d+(?=$|[-_.])", "", name, flags=re.IGNORECASE).strip("-_.") or name


def _label(runs: Sequence[Evaluated], by: str) -> str:
    if by == "objective" and runs[0].params.get("objective"):
        return str(runs[0].params["objective"])
    if len(runs) == 1:
        return runs[0].name
    names = {name_without_seed(run.name) for run in runs}
    return names.pop() if len(names) == 1 else f"{runs[0].name} and {len(runs) - 1} more"


def compared(
    runs: Sequence[Evaluated], by: str, *, with_tasks: bool = False, metrics: Sequence[str] = ()
) -> Comparison:
    """The comparison of runs.

    Args:
        by: as in `grouped`.
        with_tasks: a column for each of DataComp's 38 tasks too.
        metrics: names of held-out metrics beside the headlines.

    Raises:
        UserError: if runs that would be averaged were evaluated on different data, or for an unknown metric.
    """
    for metric in metrics:
        if metric not in ROWS:
            raise UserError(f"--metrics {metric}: unknown; there are: {', '.join(ROWS)}.")
    rows = _told_apart(grouped(runs, by))
    columns = [Measure(name, name) for name in GROUPS]
    columns += _common_mean(runs)
    if with_tasks:
        columns += [Measure(TASKS[key].name, key) for key in GROUPS["DataComp Average"]]
    columns += [Measure(ROWS[key], key, key.endswith("_rank")) for key in dict.fromkeys((*HEADLINES, *metrics))]
    columns = [column for column in columns if any(column.key in run.values for run in runs)]
    for row in rows:
        _refuse_mixture(row, columns)
    mixed = {column.key for column in columns if _is_mixed(runs, column.key)}
    return Comparison(rows, columns, mixed, _notes(rows, columns, mixed))


def _differ(one: Sequence[Count], other: Sequence[Count]) -> bool:
    """Whether two values come from different data, as far as both say. The public code does not."""
    known = {key: count for key, count in other if count is not None}
    return any(count is not None and count != known.get(key, count) for key, count in one)


def _is_mixed(runs: Sequence[Evaluated], key: str) -> bool:
    found = [run.data[key] for run in runs if key in run.values]
    return any(_differ(one, other) for i, one in enumerate(found) for other in found[:i])


def _told_apart(rows: list[Row]) -> list[Row]:
    """Two rows must not look the same: equal labels get numbers."""
    labels = [row.label for row in rows]
    for number, row in enumerate(rows):
        if labels.count(row.label) > 1:
            row.label = f"{labels[number]} ({1 + labels[:number].count(labels[number])})"
    return rows


def _common_mean(runs: Sequence[Evaluated]) -> list[Measure]:
    """Where some run lacks tasks: the mean of those that all have, under a name that says so."""
    evaluated = [run for run in runs if any(key in run.values for key in GROUPS["DataComp Average"])]
    common = [key for key in GROUPS["DataComp Average"] if evaluated and all(key in run.values for run in evaluated)]
    if not common or not any("DataComp Average" in run.missing for run in evaluated):
        return []
    name = f"mean of the {len(common)} tasks that all have"
    for run in evaluated:
        run.values[name] = math.fsum(run.values[key] for key in common) / len(common)
        run.data[name] = [count for key in common for count in run.data[key]]
        run.notes[name] = run.notes[common[0]]
    return [Measure(name, name)]


def _refuse_mixture(row: Row, columns: Sequence[Measure]) -> None:
    for column in columns:
        having = row.having(column)
        for run in having[1:]:
            if _differ(run.data[column.key], having[0].data[column.key]):
                raise UserError(
                    f"{having[0].name} and {run.name} would be averaged, but {column.name} comes from different data "
                    f"({having[0].data[column.key]} and {run.data[column.key]}): evaluate both on the same."
                )


def _notes(rows: Sequence[Row], columns: Sequence[Measure], mixed: set[str]) -> list[str]:
    notes = [note for row in rows for note in _about_row(row, columns)]
    notes += [
        f"* {column.name}: not of the same data in all rows, so none is best"
        for column in columns
        if column.key in mixed
    ]
    ways: dict[str, list[str]] = {}
    for run in (run for row in rows for run in row.runs):
        for way in dict.fromkeys(run.notes[column.key] for column in columns if column.key in run.notes):
            ways.setdefault(way, []).append(run.name)
    if len(ways) == 1:
        return [*notes, f"all evaluated after {next(iter(ways))}"]
    return [*notes, *(f"evaluated after {way}: {', '.join(names)}" for way, names in ways.items())]


def _about_row(row: Row, columns: Sequence[Measure]) -> list[str]:
    notes = []
    for name, missing in {name: keys for run in row.runs for name, keys in run.missing.items()}.items():
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        notes.append(f"{row.label}: {name} is incomplete, without {shown}")
    for column in columns:
        number = len(row.having(column))
        if 0 < number < len(row.runs):
            notes.append(f"{row.label}: {column.name} is of {number} of its {len(row.runs)} runs")
    differing = _differing(row.runs)
    if differing:
        notes.append(f"{row.label}: its runs also differ in {', '.join(differing)}")
    if len({repr(run.params.get(SEED)) for run in row.runs}) < len(row.runs):
        notes.append(f"{row.label}: some of its {len(row.runs)} runs have the same seed")
    return notes


def _differing(runs: Sequence[Evaluated]) -> list[str]:
    names = sorted({name for run in runs for name in run.params} - _FREE)
    return [name for name in names if len({repr(run.params.get(name)) for run in runs}) > 1]
