"""A table of numbers as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation.whole_files import write_whole

NOTHING = "–"
_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"→": r"$\to$", "±": r"$\pm$", "τ": r"$\tau$", "α": r"$\alpha$", "γ": r"$\gamma$", "–": "--", "−": "$-$"},
}


class Column(NamedTuple):
    """name: in CSV; label: in words, for people; spec: how people see its numbers; factor: what they are multiplied by."""

    name: str
    label: str
    spec: str = ".4g"
    factor: float = 1.0


class Cell(NamedTuple):
    """A number, a word or nothing; perhaps a standard deviation; whether it is the best of its column."""

    value: float | str | None
    std: float | None = None
    best: bool = False

    def text(self, column: Column) -> str:
        """As people read it."""
        if self.value is None:
            return NOTHING
        if isinstance(self.value, str):
            return self.value
        shown = format(column.factor * self.value, column.spec)
        # A sign that a number is to show is none of its deviation's.
        return shown if self.std is None else f"{shown} ± {format(column.factor * self.std, column.spec.lstrip('+'))}"


class Table(NamedTuple):
    """Columns, and rows with a cell for each."""

    columns: list[Column]
    rows: list[list[Cell]]


def markdown(table: Table) -> str:
    """With the best values in bold."""
    lines = [_markdown_line([column.label for column in table.columns])]
    lines.append(
        "|" + "|".join(" ---: " if _is_numeric(table, i) else " --- " for i in range(len(table.columns))) + "|"
    )
    for row in table.rows:
        texts = [(cell.text(column), cell.best) for cell, column in zip(row, table.columns)]
        lines.append(_markdown_line([f"**{text}**" if best else text for text, best in texts]))
    return "\n".join(lines) + "\n"


def comma_separated(table: Table) -> str:
    """Numbers as they are, in full and not in percent; a column NAME_std follows where there are standard deviations."""
    has_std = [any(row[i].std is not None for row in table.rows) for i in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head: list[str] = []
    for column, with_std in zip(table.columns, has_std):
        head += [column.name, f"{column.name}_std"] if with_std else [column.name]
    writer.writerow(head)
    for row in table.rows:
        line: list[object] = []
        for cell, with_std in zip(row, has_std):
            line += [cell.value, cell.std] if with_std else [cell.value]
        writer.writerow(["" if value is None else value for value in line])
    return out.getvalue()


def latex(table: Table) -> str:
    """A tabular with the rules of booktabs (\\usepackage{booktabs}), the best values in bold."""
    alignment = "".join("r" if _is_numeric(table, i) else "l" for i in range(len(table.columns)))
    lines = [f"\\begin{{tabular}}{{{alignment}}}", "\\toprule"]
    lines.append(" & ".join(_escaped(column.label) for column in table.columns) + r" \\")
    lines.append("\\midrule")
    for row in table.rows:
        texts = [(_escaped(cell.text(column)), cell.best) for cell, column in zip(row, table.columns)]
        lines.append(" & ".join(f"\\textbf{{{text}}}" if best else text for text, best in texts) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def write_table(table: Table, folder: Path, name: str) -> list[Path]:
    """Write NAME.md, NAME.csv and NAME.tex, each whole or not at all, and return the paths.

    Raises:
        OSError: a file cannot be written.
    """
    written = []
    for ending, text in (("md", markdown(table)), ("csv", comma_separated(table)), ("tex", latex(table))):
        path = folder / f"{name}.{ending}"
        write_whole(path, text)
        written.append(path)
    return written


def with_best(cells: Sequence[Cell], higher: bool | None) -> list[Cell]:
    """Mark the best of a column's numbers; none where neither way is better, or where there is nothing to compare."""
    known = [cell.value for cell in cells if isinstance(cell.value, float)]
    if higher is None or len(known) < 2:
        return list(cells)
    best = max(known) if higher else min(known)
    return [cell._replace(best=cell.value == best) for cell in cells]


def _is_numeric(table: Table, column: int) -> bool:
    return not any(isinstance(row[column].value, str) for row in table.rows)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
