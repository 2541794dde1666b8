"""A comparison of evaluated runs, with what has to be said about it: for a terminal, and as Markdown, CSV and LaTeX."""

from __future__ import annotations

from pathlib import Path

from evaluation.comparison.evaluated import Comparison
from evaluation.comparison.tables import comma_separated, latex, markdown
from evaluation.whole_files import write_whole

LEGEND = "mean ± sample standard deviation over the n runs of a row"


def terminal(comparison: Comparison) -> str:
    """A line for every column: there may be more of them than a terminal has room for. The best are in brackets."""
    table = comparison.table()
    lines = [
        [
            column.label,
            *((f"[{row[i].text(column)}]" if row[i].best else f"{row[i].text(column)} ") for row in table.rows),
        ]
        for i, column in enumerate(table.columns)
    ]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    ]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([*text[:2], rule, *text[2:], "", f"{LEGEND}; [best]", *comparison.notes])


def write_tables(folder: Path, comparison: Comparison) -> list[Path]:
    """Write comparison.md and comparison.tex with the notes, and comparison.csv with the numbers unrounded.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, said = comparison.table(), [f"{LEGEND}; the best is bold", *comparison.notes]
    texts = {
        "md": markdown(table) + "\n" + "".join(f"- {note}\n" for note in said),
        "csv": comma_separated(table),
        "tex": "".join(f"% {note}\n" for note in said) + latex(table),
    }
    written = []
    for extension, text in texts.items():
        written.append(folder / f"comparison.{extension}")
        write_whole(written[-1], text)
    return written
