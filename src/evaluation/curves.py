"""Training curves of one or more runs in one picture, from the files that training writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, and no need of a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from evaluation.figure_style import COLORS, DOTS_PER_INCH, LAYOUT, LINE_STYLES, MUTED, STYLE
from evaluation.records import Record, read_records, series
from evaluation.whole_files import replacing

FIGURE_INCHES = (12.0, 8.0)


def plot_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Draw loss, validation, temperature and learning rate of the runs, 1440 × 960 pixels.

    Args:
        runs: name → run folder with metrics.jsonl (step or samples, contrastive_loss or loss, global_loss, temperature,
            lr, samples_per_second) and results.jsonl (epoch and validation metrics). What is missing is left out.
        path: the PNG to write, whole or not at all.
    """
    metrics = {name: read_records(folder / "metrics.jsonl") for name, folder in runs.items()}
    results = {name: read_records(folder / "results.jsonl") for name, folder in runs.items()}
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=FIGURE_INCHES, layout=LAYOUT)
        _plot_loss(panels[0, 0], metrics)
        _plot_validation(panels[0, 1], results)
        _plot_training(panels[1, 0], metrics, ("temperature",), "temperature τ")
        _plot_training(panels[1, 1], metrics, ("lr",), "learning rate")
        for panel in panels.flat:
            _finish(panel)
        try:
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)
        finally:
            plt.close(figure)


def _x_key(metrics: Mapping[str, Sequence[Record]]) -> str:
    """Samples where every run has them, else steps: runs of different batch sizes compare by samples."""
    written = [records for records in metrics.values() if records]
    return "samples" if all(any("samples" in record for record in records) for records in written) else "step"


def _plot_loss(panel: Axes, metrics: Mapping[str, Sequence[Record]]) -> None:
    # The number whose gradient a global objective takes is a surrogate; the contrastive loss compares across objectives.
    _plot_training(panel, metrics, ("contrastive_loss", "loss"), "mini-batch contrastive loss", with_speed=True)
    x = _x_key(metrics)
    for color, records in zip(_cycle(COLORS), metrics.values()):
        points = series(records, x, "global_loss")
        if points[0]:
            panel.plot(*points, color=color, linestyle=":", linewidth=1.1, label="estimated global loss")


def _plot_training(
    panel: Axes, metrics: Mapping[str, Sequence[Record]], keys: Sequence[str], title: str, with_speed: bool = False
) -> None:
    """One line per run: the first of `keys` that the run has; the legend may tell the run's median throughput."""
    x = _x_key(metrics)
    panel.set_title(title)
    panel.set_xlabel({"samples": "samples seen", "step": "steps"}[x])
    for color, (name, records) in zip(_cycle(COLORS), metrics.items()):
        key = next((key for key in keys if any(key in record for record in records)), None)
        if key is None:
            continue
        label = name if key == keys[0] else f"{name} ({key})"
        speeds = series(records, x, "samples_per_second")[1]
        if with_speed and speeds:
            label += f" – {median(speeds):,.0f} samples/s"
        panel.plot(*series(records, x, key), color=color, label=label)
        if x == "samples":
            panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))


def _plot_validation(panel: Axes, results: Mapping[str, Sequence[Record]]) -> None:
    """R@1 and top-1 of every run over epochs: a colour for the run, a line style for the metric."""
    panel.set_title("held-out accuracy, %")
    panel.set_xlabel("epoch")
    names = sorted({key for records in results.values() for record in records for key in record if is_headline(key)})
    for color, (run, records) in zip(_cycle(COLORS), results.items()):
        for style, name in zip(_cycle(LINE_STYLES), names):
            epochs, values = series(records, "epoch", name)
            if epochs:
                label = metric_label(name) if len(results) == 1 else f"{run}, {metric_label(name)}"
                percent = [100 * value for value in values]
                panel.plot(epochs, percent, color=color, linestyle=style, marker="o", markersize=3.5, label=label)
    panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def is_headline(name: str) -> bool:
    """Whether a validation metric is one that sums up a model: R@1 both ways, zero-shot top-1."""
    same_caption = "same_caption" in name
    return not same_caption and bool(re.search(r"(image_to_text|text_to_image)_R@1$|top-?1$|acc1$", name))


def metric_label(name: str) -> str:
    """A validation metric's name in words."""
    label = (
        name.rsplit("/", 1)[-1].replace("image_to_text_", "image → text ").replace("text_to_image_", "text → image ")
    )
    match = re.fullmatch(r"(?:(\w+)-)?(?:zeroshot-val-)?(?:top-?1|acc1)", label)
    return f"{match[1] or ''} zero-shot top-1".strip() if match else label


def _cycle(values: Sequence[str]) -> Iterable[str]:
    while True:
        yield from values


def _finish(panel: Axes) -> None:
    lines = panel.get_lines()
    if lines:
        # One legend entry per label: runs share the label of their estimated global loss.
        entries = {str(line.get_label()): line for line in reversed(lines)}
        panel.legend(list(entries.values())[::-1], list(entries)[::-1], fontsize=8.5)
        return
    panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", va="center", color=MUTED)
    panel.set_xticks([])
    panel.set_yticks([])
