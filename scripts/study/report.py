"""Tables and figures of the study out of the folders of its runs, or of what was published of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.comparison import commands as figures
from evaluation.comparison.tables import Cell, Column, Table, markdown, with_best, write_table
from evaluation.normalizers import report as errors
from evaluation.run_folder import RunFolder
from evaluation.whole_files import write_whole
from study.errors import StudyError
from study.measure import ERRORS, FILE
from study.runs import BATCH_SIZES, GAMMAS, MEMORIES, METHODS, MORE_VISITS, SEEDS, VISITED, Case, Choice, variants

_WAYS = {"image_to_text": "i→t", "text_to_image": "t→i"}
_HELD_OUT = {"styles": ("retrieval_set", "zeroshot"), "names": ("retrieval_concept", "zeroshot_concept")}


def _recalls(label: str) -> list[str]:
    pairs, _ = _HELD_OUT[label]
    return [f"{pairs}/retrieval/{way}_R@{k}" for way in _WAYS for k in (1, 5, 10)]


# Column → what of study.json its number is the mean of; shares, shown in percent.
HEADLINES: dict[str, list[str]] = {
    **{
        f"{label} R@1 {arrow}": [f"{pairs}/retrieval/{way}_R@1"]
        for label, (pairs, _) in _HELD_OUT.items()
        for way, arrow in _WAYS.items()
    },
    **{f"{label} mean recall": _recalls(label) for label in _HELD_OUT},
    **{f"{label} zero-shot": [f"{classes}/top1"] for label, (_, classes) in _HELD_OUT.items()},
}
# Differences are looked for in the mean of six recalls, which seeds move less than R@1 alone.
SCORES = {label: names for label, names in HEADLINES.items() if "R@1" not in label}
# Which method is ahead of which, in the papers.
CLAIMS = (("fastclip", "openclip"), ("neuclip", "fastclip"), ("neuclip", "openclip"), ("neuclip", "amorlip"))
# What tuning has tried and chosen, beside the runs.
CHOICES = "choices.json"
CURVES = ("image_to_text_R@1", "text_to_image_R@1", "zeroshot-val-top1", "contrastive_loss", "temperature")
# Steps at the beginning of a run that no time is taken from.
_SKIPPED_STEPS = 50


class Row(NamedTuple):
    """A line of a table: what it is called, and its runs that are finished."""

    names: tuple[str, ...]
    runs: list[Path]


def write_report(logs: Path, choices: Mapping[Case, Choice], out: Path) -> list[Path]:
    """Write tables as Markdown, CSV and LaTeX.

    Args:
        logs: the folder of the runs' folders.

    Returns:
        What was written.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = {
        "comparison": comparison_table(logs, choices),
        "differences": differences_table(logs),
        "tuning": tuning_table(logs),
        "ablations": ablation_table(logs, choices),
        "memory": memory_table(logs),
        "visits": visits_table(logs),
        "cost": cost_table(logs),
    }
    written = [path for name, table in tables.items() if table.rows for path in write_table(table, out, name)]
    for table in tables.values():
        print(markdown(table))
    print("wrote " + ", ".join(map(str, written)))
    return written


def write_figures(logs: Path, out: Path) -> None:
    """Curves over samples seen for each batch size, and the error of the normalizers over training for both.

    Raises:
        StudyError: the tool has failed; it has said why.
    """
    for size in BATCH_SIZES:
        runs = [run for method in METHODS for run in _finished(logs, f"{method}-b{size}")]
        metrics = [word for name in CURVES for word in ("--metric", name)]
        words = ["curves", *map(str, runs), *metrics, "--out", str(out / f"curves-b{size}")]
        if runs and figures.main(words) != 0:
            raise StudyError("curves: the command failed, see above")
    compared = [f"{method}-b{size}" for size in BATCH_SIZES for method in METHODS]
    _write_errors([logs / f"{name}-s{SEEDS[0]}" for name in compared], out / "error")
    _write_errors([logs / f"visits-{name}-s{SEEDS[0]}" for name in VISITED], out / "error-visits")


def _write_errors(folders: Sequence[Path], out: Path) -> None:
    """A table and a figure of the errors of the normalizers that were measured."""
    files = [errors.newest(RunFolder(folder)) for folder in folders if (folder / ERRORS).exists()]
    if files:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "normalizer_error.md", errors.markdown(files))
        errors.write_picture(errors.draw(files), out)


def comparison_table(logs: Path, choices: Mapping[Case, Choice]) -> Table:
    """Mean and standard deviation (n − 1) over seeds for every method and batch size.

    The best of each batch size is in bold where its methods have equally many seeds.
    """
    columns = [Column("batch", "batch"), Column("method", "method"), Column("lr", "lr"), Column("gamma", "γ")]
    rows: list[list[Cell]] = []
    for size in BATCH_SIZES:
        of_size = [
            Row((str(size), method, *_chosen(choices[method, size])), _finished(logs, f"{method}-b{size}"))
            for method in METHODS
        ]
        rows += _with_metrics(of_size)
    return Table([*columns, *_metric_columns()], rows)


def differences_table(logs: Path) -> Table:
    """What a method is ahead of another, in points: mean and standard deviation of the differences at equal seeds.

    A seed gives both the same first weights, but for what only one of them has, and the same samples in the same order.
    """
    columns = [Column("runs", "runs"), Column("difference", "difference"), Column("seeds", "seeds")]
    columns += [Column(label, label, "+.1f", 100.0) for label in SCORES]
    groups = {f"batch {size}": f"{{}}-b{size}" for size in BATCH_SIZES}
    groups[f"batch {BATCH_SIZES[0]}, {MORE_VISITS} times the visits"] = "visits-{}"
    rows = []
    for group, pattern in groups.items():
        for ahead, behind in CLAIMS:
            pairs = [
                (logs / f"{pattern.format(ahead)}-s{seed}", logs / f"{pattern.format(behind)}-s{seed}")
                for seed in SEEDS
            ]
            pairs = [pair for pair in pairs if all((folder / FILE).exists() for folder in pair)]
            if pairs:
                words = map(Cell, (group, f"{ahead} − {behind}", str(len(pairs))))
                rows.append([*words, *(_difference(pairs, names) for names in SCORES.values())])
    return Table(columns, rows)


def ablation_table(logs: Path, choices: Mapping[Case, Choice]) -> Table:
    """Short runs of NeuCLIP at the smaller batch with one thing changed; nothing in the first row."""
    names = [name for name, _ in variants(choices["neuclip", BATCH_SIZES[0]])]
    return _table_of(logs, "changed", "ablation-", names)


def memory_table(logs: Path) -> Table:
    """Short runs at the smaller batch: OpenCLIP, and FastCLIP by what γ falls to."""
    return _table_of(logs, "run", "memory-", MEMORIES)


def visits_table(logs: Path) -> Table:
    """As many samples seen at the smaller batch, of fewer pairs."""
    return _table_of(logs, "run", "visits-", VISITED)


def _table_of(logs: Path, label: str, prefix: str, names: Sequence[str]) -> Table:
    rows = [Row((name,), _finished(logs, prefix + name)) for name in names]
    return Table([Column(label, label), *_metric_columns()], _with_metrics([row for row in rows if row.runs]))


def tuning_table(logs: Path) -> Table:
    """The score of every learning rate, and of every γ at the best of them."""
    entries = json.loads((logs / CHOICES).read_text(encoding="utf-8"))
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


def cost_table(logs: Path) -> Table:
    """Time of a step by the runs' own timers, over all seeds; lanes side by side on the same cores slow each other down."""
    columns = [
        *(Column("batch", "batch"), Column("method", "method"), Column("step", "ms per step", ".0f", 1000.0)),
        *(Column("objective", "objective, ms", ".1f", 1000.0), Column("normalizer", "normalizers, ms", ".1f", 1000.0)),
        Column("samples", "samples/s", ".0f"),
    ]
    rows = []
    for size in BATCH_SIZES:
        for method in METHODS:
            folders = _finished(logs, f"{method}-b{size}")
            if not folders:
                continue
            keys = ("seconds_per_step", "objective_seconds", "normalizer_seconds", "samples_per_second")
            times = [Cell(_median(folders, key)) for key in keys]
            rows.append([Cell(str(size)), Cell(method), *times])
    return Table(columns, rows)


def _with_metrics(rows: Sequence[Row]) -> list[list[Cell]]:
    # A mean over fewer seeds is no better than one over more for being higher.
    higher = True if len({len(row.runs) for row in rows if row.runs}) == 1 else None
    columns = [with_best([_statistic(row.runs, names) for row in rows], higher) for names in HEADLINES.values()]
    return [
        [*map(Cell, row.names), Cell(str(len(row.runs))), *cells]
        for row, cells in zip(rows, zip(*columns), strict=True)
    ]


def _metric_columns() -> list[Column]:
    return [Column("seeds", "seeds"), *(Column(label, label, ".1f", 100.0) for label in HEADLINES)]


def _statistic(folders: Sequence[Path], names: Sequence[str]) -> Cell:
    return _mean([_score(folder, names) for folder in folders]) if folders else Cell(None)


def _difference(pairs: Sequence[tuple[Path, Path]], names: Sequence[str]) -> Cell:
    return _mean([_score(ahead, names) - _score(behind, names) for ahead, behind in pairs])


def _mean(values: Sequence[float]) -> Cell:
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _score(folder: Path, names: Sequence[str]) -> float:
    metrics = json.loads((folder / FILE).read_text(encoding="utf-8"))["metrics"]
    return statistics.fmean(metrics[name] for name in names)


def _finished(logs: Path, prefix: str) -> list[Path]:
    """The runs of this name that have been measured, by seed."""
    folders = [logs / f"{prefix}-s{seed}" for seed in SEEDS]
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
