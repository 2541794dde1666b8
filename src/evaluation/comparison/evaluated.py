"""Runs grouped over seeds, and the mean and standard deviation of each result over a row; what does not compare is said."""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.comparison.groups import BOOKKEEPING, SEED, Statistic, statistic
from evaluation.comparison.tables import Cell, Column, Table, with_best
from evaluation.datacomp.aggregate import GROUPS, aggregates, main_metrics
from evaluation.datacomp.results import LATEST, RESULTS, read_results
from evaluation.datacomp.tasks import TASKS
from evaluation.errors import UserError
from evaluation.report import ROWS
from evaluation.run_folder import read_params

HEADLINES = ("retrieval/image_to_text_R@1", "retrieval/text_to_image_R@1", "zeroshot/top1")

# Flags in which runs of one row may differ.
_FREE = BOOKKEEPING | {SEED}

# Behind the name of a row whose runs were evaluated after different epochs or in different precisions.
MIXED_ROW = "†"


# A fact about the data of a value, as what was counted and how many; None where the file does not say.
Fact = tuple[str, int | str | None]
# Facts on which set it was: where one does not know the digest, the paths have to do.
_DIGEST, _PATH = "sha256", "path"


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
        data: column key → what data the value comes from: names and numbers of images, pairs, classes, and which set.
        notes: column key → in what other way the value came about: epoch or iteration, precision.
    """

    name: str
    params: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    data: dict[str, list[Fact]] = field(default_factory=dict)
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

    def in_several_ways(self, measure: Measure) -> bool:
        """Whether the mean of a column is over several epochs, iterations or precisions."""
        return len({run.notes[measure.key] for run in self.having(measure)}) > 1


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
        labels = [f"{row.label} {MIXED_ROW}" if self._ways(row) else row.label for row in self.rows]
        parts = [[Cell(label) for label in labels], [Cell(len(row.runs)) for row in self.rows]]
        for measure in self.columns:
            mark = " *" if measure.key in self.mixed else ""
            unit = "" if measure.lower_is_better else ", %"
            columns.append(
                Column(measure.key, f"{measure.name}{unit}{mark}", ".2f", 1.0 if measure.lower_is_better else 100.0)
            )
            found = [row.statistic(measure) for row in self.rows]
            cells = [Cell(None) if each is None else Cell(each.mean, each.std) for each in found]
            comparable = measure.key not in self.mixed and not any(
                self._partial(row, measure) or row.in_several_ways(measure) for row in self.rows
            )
            parts.append(with_best(cells, not measure.lower_is_better if comparable else None))
        return Table(columns, [list(row) for row in zip(*parts)])

    def _ways(self, row: Row) -> bool:
        return any(row.in_several_ways(measure) for measure in self.columns)

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


def read_run(folder: Path, epoch: int | None, iteration: int | None = None) -> Evaluated:
    """Read what was evaluated of a run: DataComp's tasks and held-out sets, of one checkpoint or of the newest evaluated.

    Args:
        folder: the run's.
        epoch: of the checkpoint epoch_N.pt.
        iteration: of the checkpoint iter_S.pt.

    Raises:
        UserError: if there is nothing, or a file cannot be understood.
    """
    params = folder / "params.txt"
    run = Evaluated(folder.resolve().name, read_params(params) if params.is_file() else {})
    results = _results_file(folder, epoch, iteration)
    if results is not None:
        _add_datacomp(run, results)
    _add_held_out(run, folder / "evaluation.json", epoch, iteration)
    if not run.values:
        wanted = f" of {when(epoch, iteration)}" if (epoch, iteration) != (None, None) else ""
        raise UserError(
            f"{folder} has no evaluation{wanted}; run src/evaluation/main.py --train_output_dir {folder} first."
        )
    return run


def when(epoch: object, iteration: object) -> str:
    """Which checkpoint, in words: its epoch, or else its iteration."""
    if epoch is not None:
        return f"epoch {epoch}"
    return f"iteration {iteration}" if iteration is not None else LATEST


def _results_file(folder: Path, epoch: int | None, iteration: int | None) -> Path | None:
    found: dict[tuple[int, int], Path] = {}
    for path in (folder / "eval_results").glob(f"*{RESULTS}"):
        match = re.fullmatch(rf"(?:(epoch|iter)_([0-9]+)|{LATEST})_{RESULTS}", path.name)
        if match:
            # epoch_latest.pt is evaluated under that name where it does not say its epoch, and is then taken for the newest.
            found[{"iter": 0, "epoch": 1, None: 2}[match[1]], int(match[2] or 0)] = path
    if iteration is not None:
        return found.get((0, iteration))
    if epoch is not None:
        return found.get((1, epoch))
    return found[max(found)] if found else None


def _add_datacomp(run: Evaluated, path: Path) -> None:
    lines = {line["key"]: line for line in read_results(path)}
    digests = {line.get("checkpoint_sha256") for line in lines.values()}
    if len(digests) > 1:
        raise UserError(f"{path} holds results of several checkpoints; run src/evaluation/main.py on the run again.")
    tasks = main_metrics(lines.values())
    after = path.name.removesuffix(f"_{RESULTS}").replace("iter_", "iteration_").replace("_", " ")

    def add(name: str, value: float, keys: Iterable[str]) -> None:
        run.values[name] = value
        used = [lines[key] for key in keys]
        run.data[name] = [(line["key"], line.get("images")) for line in used]
        precisions = sorted({str(line.get("precision") or "of the public code") for line in used})
        run.notes[name] = _note(after, precisions)

    for key, value in tasks.items():
        add(key, value, [key])
    for name, (value, keys, missing) in aggregates(tasks).items():
        if value is not None:
            add(name, value, keys)
        else:
            run.missing[name] = missing


def _note(after: str, precisions: Sequence[str]) -> str:
    return f"{after}, {' and '.join(precisions)}"


def _add_held_out(run: Evaluated, path: Path, epoch: int | None, iteration: int | None) -> None:
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metrics, counts, checkpoint = content["metrics"], dict(content["counts"]), content["checkpoint"]
        at = checkpoint["epoch"], checkpoint.get("iteration")
        metrics = {name: float(metrics[name]) for name in ROWS if metrics.get(name) is not None}
        sources = dict(content.get("data") or {})
        precision = str(content.get("precision", "fp32"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be understood ({error!r}); run src/evaluation/main.py again.") from None
    if (epoch, iteration) != (None, None) and at != (epoch, iteration):
        return
    for name, value in metrics.items():
        kind = "zeroshot" if name.startswith("zeroshot/") else "pairs"
        run.values[name] = value
        run.data[name] = sorted(
            (key, count) for key, count in counts.items() if key.startswith("zeroshot") == (kind == "zeroshot")
        )
        run.data[name] += _identity(sources, kind)
        run.notes[name] = _note(when(*at), [precision])


def _identity(sources: dict[str, Any], kind: str) -> list[Fact]:
    """Which set it was, as far as evaluation.json says; old files have only its path."""
    digest, path = sources.get(f"{kind}_sha256"), sources.get(kind)
    return [
        (_DIGEST, str(digest)[:12] if digest is not None else None),
        (_PATH, os.path.normpath(path) if isinstance(path, str) else None),
    ]


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
    """`neuclip-seed3-b256` → `neuclip-b256`; the S-16 of a model is no seed, s16 is."""
    return re.sub(r"(^|[-_.])(seed[-_=]?|s=?)\d+(?=$|[-_.])", "", name, flags=re.IGNORECASE).strip("-_.") or name


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


def _differ(one: Sequence[Fact], other: Sequence[Fact]) -> bool:
    """Whether two values come from different data, as far as both say. The public code does not."""
    mine, known = ({key: fact for key, fact in facts if fact is not None} for facts in (one, other))
    if _DIGEST in mine and _DIGEST in known:
        # The same set may lie under another path.
        mine.pop(_PATH, None)
    return any(fact != known.get(key, fact) for key, fact in mine.items())


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
        run.data[name] = [fact for key in common for fact in run.data[key]]
        after = run.notes[common[0]].split(", ")[0]  # of one file, thus of one checkpoint
        run.notes[name] = _note(after, sorted({run.notes[key].removeprefix(f"{after}, ") for key in common}))
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
    notes += [
        f"{MIXED_ROW} {row.label}: {column.name} is a mean over results of {'; '.join(sorted(ways))}, so none is best"
        for row in rows
        for column in columns
        if len(ways := {run.notes[column.key] for run in row.having(column)}) > 1
    ]
    return [*notes, *_how_evaluated(rows, columns)]


def _how_evaluated(rows: Sequence[Row], columns: Sequence[Measure]) -> list[str]:
    ways: dict[str, list[str]] = {}
    for run in (run for row in rows for run in row.runs):
        for way in dict.fromkeys(run.notes[column.key] for column in columns if column.key in run.notes):
            ways.setdefault(way, []).append(run.name)
    if len(ways) == 1:
        return [f"all evaluated after {next(iter(ways))}"]
    return [f"evaluated after {way}: {', '.join(names)}" for way, names in ways.items()]


def _about_row(row: Row, columns: Sequence[Measure]) -> list[str]:
    notes = []
    for run in row.runs:
        for name, missing in run.missing.items():
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            notes.append(f"{run.name}: {name} is incomplete, without {shown}")
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
