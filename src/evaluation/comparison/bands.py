"""Curves of groups of runs: a panel for a metric, a line for a group's mean, a band for its standard deviation over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from evaluation.comparison.groups import Group
from evaluation.comparison.metrics import is_share, label
from evaluation.figure_style import COLORS, LAYOUT, LINE_STYLES, MUTED, STYLE

X_LABELS = {"samples": "samples seen", "step": "steps", "epoch": "epochs"}
PANEL_INCHES = (4.4, 3.2)
LEGEND_LINE_INCHES = 0.24
MOST_COLUMNS = 3
FEW_POINTS = 25


class Band(NamedTuple):
    """mean and std (of a sample, 0 for one run) over the seeds, at x; all [P] float64."""

    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def band(group: Group, metric: str, x: str) -> Band | None:
    """A metric's mean over the group's runs, where all that have it have it; None if none has.

    Runs that logged at other places are interpolated linearly. Of a run that has stopped early the others' rest is left
    out: a mean over fewer seeds would jump there.
    """
    curves = [points for points in (run.points(metric, x) for run in group.runs) if points[0]]
    if not curves:
        return None
    begin, end = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    places = np.unique(np.concatenate([xs for xs, _ in curves]))
    places = places[(places >= begin) & (places <= end)]
    if not len(places):
        return None
    values = np.stack([np.interp(places, xs, ys) for xs, ys in curves])
    std = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(places)
    return Band(places, values.mean(axis=0), std)


def draw_curves(groups: Sequence[Group], metrics: Sequence[str], x: str) -> Figure:
    """One panel per metric, one line per group; with several seeds a band of one standard deviation to either side.

    Args:
        metrics: at least one name; shares are drawn in percent.
        x: samples, step or epoch.
    """
    columns = min(MOST_COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    legend_columns = max(1, min(len(groups), int(columns * PANEL_INCHES[0] * 10 / (8 + max(map(_width, groups))))))
    legend_inches = 0.3 + LEGEND_LINE_INCHES * math.ceil(len(groups) / legend_columns)
    with matplotlib.rc_context(STYLE):
        size = (columns * PANEL_INCHES[0], rows * PANEL_INCHES[1] + legend_inches)
        figure = Figure(figsize=size, layout=LAYOUT)
        panels = figure.subplots(rows, columns, squeeze=False)
        for panel, metric in zip(panels.flat, metrics):
            _draw_panel(panel, groups, metric, x)
        for panel in list(panels.flat)[len(metrics) :]:
            panel.remove()
        lines = {str(line.get_label()): line for panel in figure.axes for line in panel.get_lines()}
        ordered = [words for words in map(_legend, groups) if words in lines]
        handles = [lines[words] for words in ordered]
        figure.legend(handles, ordered, loc="outside lower center", ncols=legend_columns, fontsize=9)
    return figure


def _draw_panel(panel: Axes, groups: Sequence[Group], metric: str, x: str) -> None:
    panel.set_title(label(metric))
    panel.set_xlabel(X_LABELS[x])
    factor = 100.0 if is_share(metric) else 1.0
    for number, group in enumerate(groups):
        found = band(group, metric, x)
        if found is None:
            continue
        color, stroke = COLORS[number % len(COLORS)], LINE_STYLES[number % len(LINE_STYLES)]
        mean, std = factor * found.mean, factor * found.std
        marker = "o" if len(found.x) <= FEW_POINTS else None
        panel.plot(found.x, mean, color=color, linestyle=stroke, marker=marker, markersize=3.5, label=_legend(group))
        if len(group.runs) > 1:
            panel.fill_between(found.x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    if not panel.get_lines():
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", va="center", color=MUTED)
    elif x == "epoch":
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend(group: Group) -> str:
    return group.label if len(group.runs) == 1 else f"{group.label}, {len(group.runs)} seeds"


def _width(group: Group) -> int:
    return len(_legend(group))
