"""Final metrics by the value of one flag or of several: the ablations of arXiv 2511.08417 (Tables 12–16)."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.comparison.groups import Group, final, in_words
from evaluation.comparison.metrics import higher_is_better, is_share, label
from evaluation.comparison.tables import Cell, Column, Table, with_best

# What the paper calls it → the flag.
PAPER_TABLES = {
    "architecture": "npn_arch",
    "objective": "npn_objective",
    "T_r": "npn_restart_iter",
    "T_u": "npn_repetition",
    "m": "npn_num_protos",
    "gamma": "gamma",
    "optimizer": "npn_optimizer",
}


def ablation_table(groups: Sequence[Group], by: Sequence[str], metrics: Sequence[str]) -> Table:
    """A row per group: the flags' values, the number of runs, the final metrics with their standard deviation over seeds.

    Where several groups share the flags' values, a column names their runs.
    """
    columns, parts = [], []
    for i, flag in enumerate(by):
        columns.append(Column(flag, in_words(flag), ".10g"))
        parts.append([_value(group.values[i]) for group in groups])
    if len({str(group.values) for group in groups}) < len(groups):
        columns.append(Column("runs", "runs"))
        parts.append([Cell(" ".join(run.name for run in group.runs)) for group in groups])
    columns.append(Column("seeds", "seeds", "g"))
    parts.append([Cell(len(group.runs)) for group in groups])
    for metric in metrics:
        columns.append(Column(metric, label(metric), *((".2f", 100.0) if is_share(metric) else (".4g",))))
        found = [final(group, metric) for group in groups]
        cells = [Cell(None) if each is None else Cell(each.mean, each.std) for each in found]
        parts.append(with_best(cells, higher_is_better(metric)))
    return Table(columns, [list(row) for row in zip(*parts)])


def _value(value: object) -> Cell:
    if value is None:
        return Cell(None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(value if is_number else str(value))
