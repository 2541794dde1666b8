"""Tables and figures of the study out of the folders of its runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation import normalizer_error
from evaluation.comparison import commands as figures
from evaluation.comparison.tables import Cell, Column, Table, markdown, with_best, write_table
from study.errors import StudyError
from study.measure import FILE
from study.runs import (
    BATCH_SIZES,
    GAMMAS,
    METHODS,
    SEEDS,
    Case,
    Choice,
    Run,
    Setup,
    ablation_runs,
    memory_runs,
    visits_runs,
)

# Of study.json; shares, shown in percent.
HEADLINES = {
    "retrieval_set/retrieval/image_to_text_R@1": "styles R@1 i→t",
    "retrieval_set/retrieval/text_to_image_R@1": "styles R@1 t→i",
    "retrieval_concept/retrieval/image_to_text_R@1": "names R@1 i→t",
    "retrieval_concept/retrieval/text_to_image_R@1": "names R@1 t→i",
    "zeroshot/top1": "styles zero-shot",
    "zeroshot_concept/top1": "names zero-shot",
}
# What tuning has tried and chosen, beside the runs.
CHOICES = "choices.json"
CURVES = ("image_to_text_R@1", "text_to_image_R@1", "zeroshot-val-top1", "contrastive_loss", "temperature")
# Steps at the beginning of a run that no time is taken from.
_SKIPPED_STEPS = 50


class Row(NamedTuple):
    """A line of a table: what it is called, and its runs that are finished."""

    names: tuple[str, ...]
    runs: list[Path]


def write_report(setup: Setup, choices: Mapping[Case, Choice], out: Path) -> list[Path]:
    """Write tables as Markdown, CSV and LaTeX.

    Returns:
        What was written.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = {
        "comparison": comparison_table(setup, choices),
        "tuning": tuning_table(setup),
        "ablations": ablation_table(setup, choices),
        "memory": memory_table(setup, choices),
        "visits": visits_table(setup, choices),
        "cost": cost_table(setup),
    }
    written = [path for name, table in tables.items() if table.rows for path in write_table(table, out, name)]
    for table in tables.values():
        print(markdown(table))
    print("wrote " + ", ".join(map(str, written)))
    return written


def write_figures(setup: Setup, out: Path) -> None:
    """Curves over samples seen, and the error of the normalizers over training, for each batch size.

    Raises:
        StudyError: one of the tools has failed; it has said why.
    """
    for size in BATCH_SIZES:
        runs = [run for method in METHODS for run in _finished(setup, f"{method}-b{size}")]
        first = [run for run in runs if run.name.endswith(f"-s{SEEDS[0]}")]
        if not first:
            continue
        metrics = [word for name in CURVES for word in ("--metric", name)]
        words = ["curves", *map(str, runs), *metrics, "--out", str(out / f"curves-b{size}")]
        _call("curves", figures.main, words)
        words = ["--train_output_dir", *map(str, first), "--workers", "1", "--out", str(out / f"error-b{size}")]
        _call("normalizer error", normalizer_error.main, words)


def _call(what: str, tool: Callable[[list[str]], int], words: list[str]) -> None:
    if tool(words) != 0:
        raise StudyError(f"{what}: the command failed, see above")


def comparison_table(setup: Setup, choices: Mapping[Case, Choice]) -> Table:
    """Mean and standard deviation (n − 1) over seeds for every method and batch size.

    The best of each batch size is in bold where its methods have equally many seeds.
    """
    columns = [Column("batch", "batch"), Column("method", "method"), Column("lr", "lr"), Column("gamma", "γ")]
    rows: list[list[Cell]] = []
    for size in BATCH_SIZES:
        of_size = [
            Row((str(size), method, *_chosen(choices[method, size])), _finished(setup, f"{method}-b{size}"))
            for method in METHODS
        ]
        rows += _with_metrics(of_size)
    return Table([*columns, *_metric_columns()], rows)


def ablation_table(setup: Setup, choices: Mapping[Case, Choice]) -> Table:
    """Short runs of NeuCLIP at the smaller batch with one thing changed; nothing in the first row."""
    return _table_of(ablation_runs(setup, choices), "ablation-", "changed", setup)


def memory_table(setup: Setup, choices: Mapping[Case, Choice]) -> Table:
    """Short runs of FastCLIP at the smaller batch by what γ falls to."""
    return _table_of(memory_runs(setup, choices), "memory-", "fastclip", setup)


def visits_table(setup: Setup, choices: Mapping[Case, Choice]) -> Table:
    """As many samples seen at the smaller batch, of fewer pairs."""
    return _table_of(visits_runs(setup, choices), "visits-", "method", setup)


def _table_of(runs: Sequence[Run], prefix: str, label: str, setup: Setup) -> Table:
    names = dict.fromkeys(_without_seed(run).removeprefix(prefix) for run in runs)
    rows = [Row((name,), _finished(setup, prefix + name)) for name in names]
    return Table([Column(label, label), *_metric_columns()], _with_metrics([row for row in rows if row.runs]))


def tuning_table(setup: Setup) -> Table:
    """The score of every learning rate, and of every γ at the best of them."""
    entries = json.loads((setup.logs / CHOICES).read_text(encoding="utf-8"))
    tried = sorted({rate for entry in entries for rate in entry["scores"]}, key=float)
    columns = [Column("batch", "batch"), Column("method", "method")]
    columns += [Column(f"lr_{rate}", f"lr {rate}", ".2f", 100.0) for rate in tried]
    columns += [Column(f"gamma_{gamma:g}", f"γ {gamma:g}", ".2f", 100.0) for gamma in GAMMAS]
    rows = []
    for entry in entries:
        rates = [Cell(entry["scores"].get(rate), best=float(rate) == entry["lr"]) for rate in tried]
        gammas = [Cell(entry["gamma_scores"].get(f"{value:g}"), best=value == entry["gamma"]) for value in GAMMAS]
        rows.append([Cell(str(entry["batch_size"])), Cell(entry["method"]), *rates, *gammas])
    return Table(columns, rows)


def cost_table(setup: Setup) -> Table:
    """Time of a step by the runs' own timers, over all seeds; lanes side by side on the same cores slow each other down."""
    columns = [
        *(Column("batch", "batch"), Column("method", "method"), Column("step", "ms per step", ".0f", 1000.0)),
        *(Column("objective", "objective, ms", ".1f", 1000.0), Column("normalizer", "normalizers, ms", ".1f", 1000.0)),
        Column("samples", "samples/s", ".0f"),
    ]
    rows = []
    for size in BATCH_SIZES:
        for method in METHODS:
            folders = _finished(setup, f"{method}-b{size}")
            if not folders:
                continue
            keys = ("seconds_per_step", "objective_seconds", "normalizer_seconds", "samples_per_second")
            times = [Cell(_median(folders, key)) for key in keys]
            rows.append([Cell(str(size)), Cell(method), *times])
    return Table(columns, rows)


def _with_metrics(rows: Sequence[Row]) -> list[list[Cell]]:
    # A mean over fewer seeds is no better than one over more for being higher.
    higher = True if len({len(row.runs) for row in rows if row.runs}) == 1 else None
    columns = [with_best([_statistic(row.runs, name) for row in rows], higher) for name in HEADLINES]
    return [
        [*map(Cell, row.names), Cell(str(len(row.runs))), *cells]
        for row, cells in zip(rows, zip(*columns), strict=True)
    ]


def _metric_columns() -> list[Column]:
    return [Column("seeds", "seeds"), *(Column(name, label, ".1f", 100.0) for name, label in HEADLINES.items())]


def _statistic(folders: Sequence[Path], name: str) -> Cell:
    values = [json.loads((folder / FILE).read_text(encoding="utf-8"))["metrics"][name] for folder in folders]
    if not values:
        return Cell(None)
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _finished(setup: Setup, prefix: str) -> list[Path]:
    """The runs of this name that have been measured, by seed."""
    folders = [setup.logs / f"{prefix}-s{seed}" for seed in SEEDS]
    return [folder for folder in folders if (folder / FILE).exists()]


def _median(folders: Sequence[Path], key: str) -> float | None:
    """Median over the logged steps of all runs: it does not see checkpoints and evaluations."""
    values = [
        line[key]
        for folder in folders
        for line in _lines(folder / "metrics.jsonl")
        if line["step"] > _SKIPPED_STEPS and isinstance(line.get(key), float) and math.isfinite(line[key])
    ]
    return statistics.median(values) if values else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _chosen(choice: Choice) -> tuple[str, str]:
    return f"{choice.lr:g}", "–" if choice.gamma is None else f"{choice.gamma:g}"


def _without_seed(run: Run) -> str:
    return run.name.rpartition("-s")[0]
