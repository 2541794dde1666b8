"""Normalizer errors of runs: kept in a file per run, shown as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, and no need of a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evaluation.figure_style import COLORS, MUTED, STYLE, save_figure
from evaluation.run_folder import Checkpoint, RunFolder
from evaluation.whole_files import write_whole

Record = dict[str, Any]

# estimate → line style
ESTIMATES = {"used": "-", "own": "--", "batch": ":"}


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
        except (OSError, ValueError, KeyError, TypeError):
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
        """Take in a measurement; an older one of the same epoch and setting goes."""
        facts = {"epoch": checkpoint.epoch, "iteration": checkpoint.iteration, "sha256": checkpoint.sha256()}
        record = {**facts, **self.setting, **measured}
        same = ("epoch", "iteration", *self.setting)
        self._records = [old for old in self._records if any(old.get(name) != record[name] for name in same)]
        self._records.append(record)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        content = {"run": self.run.name, "objective": self.run.objective, "records": self._records}
        write_whole(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def markdown(files: Sequence[ErrorFile]) -> str:
    """A Markdown table, a line for each checkpoint: errors of each estimate, image and text side, and the two means."""
    head = "| run | N | epoch | τ | used, mse | own, mse | batch, mse | used, bias | mean α used | true mean α |"
    lines = [head, "| --- |" + " ---: |" * 9]
    for file in files:
        for record in file.records:
            lines.append("| " + " | ".join(_cells(file, record)) + " |")
    lines += [
        "",
        "mse: mean of (α̂ − α)² over the probes, image / text anchors; bias: mean of α̂ − α over both. batch: the estimate "
        "from the probe's own batch of N; own: what the method has learnt or remembers before it sees that batch; used: what "
        "a training step divides by. α is exact over all samples at the method's ε and τ.",
        "",
    ]
    return "\n".join(lines)


def _cells(file: ErrorFile, record: Record) -> list[str]:
    estimates = record["estimates"]
    used = estimates["used"]
    return [
        file.run.name,
        str(record["batch"]),
        str(record["epoch"] if record["epoch"] is not None else record["iteration"]),
        f"{record['temperature']:.4f}",
        *(_pair(estimates[name], "mse") for name in ("used", "own", "batch")),
        _mean(used, "bias"),
        _mean(used, "mean"),
        f"{sum(record['truth'].values()) / 2:.3f}",
    ]


def _pair(estimate: Record | None, name: str) -> str:
    if estimate is None:
        return "–"
    return " / ".join(
        "–" if estimate[side][name] is None else f"{estimate[side][name]:.3f}" for side in ("image", "text")
    )


def _mean(estimate: Record, name: str) -> str:
    values = [estimate[side][name] for side in ("image", "text")]
    return "–" if None in values else f"{sum(values) / 2:.3f}"


def draw(files: Sequence[ErrorFile]) -> Figure:
    """Errors over samples seen: a panel for each global batch size, a colour for each objective, a line style for each
    estimate. The vertical axis is logarithmic."""
    batches = sorted({file.setting["batch"] for file in files})
    colors = dict(zip(dict.fromkeys(file.run.objective for file in files), cycle(COLORS)))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(batches), figsize=(5.4 * len(batches) + 0.4, 5.2), layout="constrained", sharey=True, squeeze=False
        )
        for panel, batch in zip(panels[0], batches):
            for file in files:
                if file.setting["batch"] == batch:
                    _draw_run(panel, file, colors[file.run.objective])
            panel.set_title(f"global batch {batch:,}")
            panel.set_xlabel("samples seen")
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        panels[0][0].set_ylabel("mean squared error of log-normalizers")
        entries = [Line2D([], [], color=color, label=name, linewidth=3) for name, color in colors.items()]
        entries += [Line2D([], [], color=MUTED, linestyle=line, label=name) for name, line in ESTIMATES.items()]
        figure.legend(
            handles=entries, loc="outside lower center", ncols=max(3, len(colors) if len(batches) == 1 else 7)
        )
    return figure


def _draw_run(panel: Axes, file: ErrorFile, color: str) -> None:
    samples = [record["samples_seen"] for record in file.records]
    for name, line in ESTIMATES.items():
        values = [(record["estimates"][name] or {}).get("mse") for record in file.records]
        if name == "batch" and all(record["estimates"]["own"] is None for record in file.records):
            continue  # it is what they use
        if any(value is not None for value in values):
            points = [float("nan") if value is None else value for value in values]
            label = f"{file.run.name}, {name}"
            panel.plot(samples, points, line, color=color, label=label, marker="o", markersize=3.5)


def write_picture(figure: Figure, folder: Path) -> list[Path]:
    """normalizer_error.pdf and .png in a folder."""
    written = save_figure(figure, folder, "normalizer_error")
    plt.close(figure)
    return written
