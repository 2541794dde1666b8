"""Normalizer errors of runs: kept in a file per run, shown as a table and as a picture."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, and no need of a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evaluation.comparison.tables import Cell, Column, Table
from evaluation.comparison.tables import markdown as markdown_table
from evaluation.figure_style import COLORS, MUTED, STYLE, save_figure
from evaluation.run_folder import Checkpoint, RunFolder
from evaluation.whole_files import write_whole

Record = dict[str, Any]

# estimate → line style
ESTIMATES = {"used": "-", "own": "--", "batch": ":"}
# Where runs outnumber the colours, which are taken again.
MARKERS = ("o", "s", "^", "D")
LEGEND_LINE_INCHES = 0.24

# What measurements of one setting share.
SETTING = ("data", "batch", "probes", "seed", "precision")
COLUMNS = (
    Column("run", "run"),
    Column("batch", "N", ".10g"),
    Column("checkpoint", "checkpoint"),
    Column("temperature", "τ", ".4f"),
    Column("used_mse", "used, mse"),
    Column("own_mse", "own, mse"),
    Column("batch_mse", "batch, mse"),
    Column("used_bias", "used, bias", ".3f"),
    Column("used_mean", "mean α used", ".3f"),
    Column("true_mean", "true mean α", ".3f"),
    Column("own_unknown", "own unknown, %", ".1f", 100.0),
)
EXPLANATION = (
    "mse: mean of (α̂ − α)² over the probes, image / text anchors; bias: mean of α̂ − α over both. batch: the estimate "
    "from the probe's own batch of N; own: what the method has learnt or remembers before it sees that batch; used: what "
    "a training step divides by; own unknown: probes of which the method has learnt nothing yet, left out of the numbers of "
    "own. α is exact over all samples at the method's ε and τ."
)


class ErrorFile:
    """logs/NAME/normalizer_error.json: what was measured of a run's checkpoints.

    Args:
        run: the run.
        setting: data, batch, probes and seed: measurements of another setting stay in the file but are not shown.
    """

    def __init__(self, run: RunFolder, setting: dict[str, Any]) -> None:
        self.run, self.setting = run, setting
        self.path = run.path / "normalizer_error.json"
        self._records: list[Record] = []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self._records = [record for record in content["records"] if isinstance(record, dict)]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            pass  # none yet, or not ours: it is written anew

    @property
    def records(self) -> list[Record]:
        """The measurements in this setting, in the order of training."""
        shown = [r for r in self._records if all(r.get(name) == value for name, value in self.setting.items())]
        return sorted(shown, key=lambda record: record["step"])

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether these very weights were measured in this setting."""
        digest = checkpoint.sha256()
        return any(record["sha256"] == digest for record in self.records)

    def add(self, checkpoint: Checkpoint, measured: Record) -> None:
        """Take in a measurement; an older one of the same epoch (or iteration) and setting goes."""
        facts = {"epoch": checkpoint.epoch, "iteration": checkpoint.iteration, "sha256": checkpoint.sha256()}
        record = {**facts, **self.setting, **measured}
        same = ("epoch", "iteration", *self.setting)
        self._records = [old for old in self._records if any(old.get(name) != record[name] for name in same)]
        self._records.append(record)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        content = {"run": self.run.name, "objective": self.run.objective, "records": self._records}
        write_whole(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def newest(run: RunFolder) -> ErrorFile:
    """A run's file in the setting of what was measured last; nothing in it where nothing was."""
    everything = ErrorFile(run, {})
    last = everything.records[-1:]
    return ErrorFile(run, {name: record.get(name) for record in last for name in SETTING})


def error_table(files: Sequence[ErrorFile]) -> Table:
    """A row for each checkpoint: errors of each estimate, image and text side, and the two means; the share of probes without
    an own estimate where there are such."""
    columns = list(COLUMNS)
    rows = [_cells(file, record) for file in files for record in file.records]
    if not any(row[-1].value for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(columns, rows)


def markdown(files: Sequence[ErrorFile]) -> str:
    """`error_table` in Markdown, and what its columns mean."""
    return markdown_table(error_table(files)) + "\n" + EXPLANATION + "\n"


def _cells(file: ErrorFile, record: Record) -> list[Cell]:
    estimates = record["estimates"]
    used, own = estimates["used"], estimates["own"]
    return [
        Cell(file.run.name),
        Cell(record["batch"]),
        Cell(_when(record)),
        Cell(record["temperature"]),
        *(_pair(estimates[name], "mse") for name in ("used", "own", "batch")),
        _mean(used, "bias"),
        _mean(used, "mean"),
        Cell(sum(record["truth"].values()) / 2),
        Cell(None if own is None else own["unknown"]),
    ]


def _when(record: Record) -> str | None:
    if record["epoch"] is not None:
        return f"epoch {record['epoch']}"
    return None if record["iteration"] is None else f"iter {record['iteration']}"


def _pair(estimate: Record | None, name: str) -> Cell:
    if estimate is None:
        return Cell(None)
    sides = (Cell(estimate[side][name]) for side in ("image", "text"))
    return Cell(" / ".join(cell.text(Column(name, name, ".3f")) for cell in sides))


def _mean(estimate: Record, name: str) -> Cell:
    values = [estimate[side][name] for side in ("image", "text")]
    return Cell(None if None in values else sum(values) / 2)


class Look(NamedTuple):
    """How a line is told from others: a colour, and a marker where there are more lines than colours."""

    color: str
    marker: str


def line_names(files: Sequence[ErrorFile]) -> list[str]:
    """What the legend calls the line of each file: its objective where that is one run's in every panel, else its run; the
    run's path where two runs share a name."""
    panels = [(file.setting["batch"], file.run.objective) for file in files]
    if len(set(panels)) == len(panels):
        return [file.run.objective for file in files]
    paths = {file.run.path.resolve(): file.run.name for file in files}
    shared = Counter(paths.values())
    return [file.run.name if shared[file.run.name] == 1 else str(file.run.path) for file in files]


def draw(files: Sequence[ErrorFile]) -> Figure:
    """Errors over samples seen: a panel for each global batch size, a colour for each objective, or for each run where a panel
    has two runs of one objective; a line style for each estimate. The vertical axis is logarithmic."""
    batches = sorted({file.setting["batch"] for file in files})
    names = line_names(files)
    looks = {
        name: Look(COLORS[number % len(COLORS)], MARKERS[number // len(COLORS) % len(MARKERS)])
        for number, name in enumerate(dict.fromkeys(names))
    }
    width, height = 5.4 * len(batches) + 0.4, 4.6
    entries = [
        Line2D([], [], color=look.color, marker=look.marker, markersize=6, label=name, linewidth=3)
        for name, look in looks.items()
    ]
    entries += [Line2D([], [], color=MUTED, linestyle=line, label=name) for name, line in ESTIMATES.items()]
    columns = max(1, min(len(entries), int(width * 10 / (8 + max(map(len, names), default=0)))))
    height += LEGEND_LINE_INCHES * math.ceil(len(entries) / columns)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(batches), figsize=(width, height), layout="constrained", sharey=True, squeeze=False
        )
        for panel, batch in zip(panels[0], batches):
            for file, name in zip(files, names):
                if file.setting["batch"] == batch:
                    _draw_run(panel, file, looks[name])
            panel.set_title(f"global batch {batch:,}")
            panel.set_xlabel("samples seen")
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        panels[0][0].set_ylabel("mean squared error of log-normalizers")
        figure.legend(handles=entries, loc="outside lower center", ncols=columns)
    return figure


def _draw_run(panel: Axes, file: ErrorFile, look: Look) -> None:
    samples = [record["samples_seen"] for record in file.records]
    for name, line in ESTIMATES.items():
        values = [(record["estimates"][name] or {}).get("mse") for record in file.records]
        if name == "batch" and all(record["estimates"]["own"] is None for record in file.records):
            continue  # it is what they use
        if any(value is not None for value in values):
            points = [float("nan") if value is None else value for value in values]
            label = f"{file.run.name}, {name}"
            panel.plot(samples, points, line, color=look.color, label=label, marker=look.marker, markersize=3.5)


def write_picture(figure: Figure, folder: Path) -> list[Path]:
    """normalizer_error.pdf and .png in a folder."""
    written = save_figure(figure, folder, "normalizer_error")
    plt.close(figure)
    return written
