"""The numbers of one or more runs as JSON, as a Markdown table and as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.whole_files import write_whole

# Metric name → its name in a table, in the order of the table.
ROWS = {
    "retrieval/image_to_text_R@1": "image → text R@1",
    "retrieval/image_to_text_R@5": "image → text R@5",
    "retrieval/image_to_text_R@10": "image → text R@10",
    "retrieval/text_to_image_R@1": "text → image R@1",
    "retrieval/text_to_image_R@5": "text → image R@5",
    "retrieval/text_to_image_R@10": "text → image R@10",
    "retrieval_same_caption/image_to_text_R@1": "image → text R@1, any equal caption",
    "retrieval_same_caption/text_to_image_R@1": "text → image R@1, any equal caption",
    "retrieval/image_to_text_median_rank": "image → text median rank",
    "retrieval/text_to_image_median_rank": "text → image median rank",
    "retrieval/image_to_text_mean_rank": "image → text mean rank",
    "retrieval/text_to_image_mean_rank": "text → image mean rank",
    "zeroshot/top1": "zero-shot top-1",
    "zeroshot/top5": "zero-shot top-5",
    "zeroshot/mean_per_class_recall": "zero-shot mean per-class recall",
}


class Result(NamedTuple):
    """The evaluation of one run's checkpoint.

    run, objective: names; checkpoint: `file`, `sha256`, `epoch` and `iteration` (None: not known); data: the sets used;
    metrics, chance: name → value or None; counts: name → number of samples, captions, classes; precision: of the towers.
    """

    run: str
    objective: str
    model: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, float | None]
    chance: dict[str, float | None]
    counts: dict[str, int]
    precision: str = "fp32"


class TableRow(NamedTuple):
    """A line of the table in words: metric, one value per run, chance, and how far the first run is above chance."""

    metric: str
    values: list[str]
    chance: str
    factor: str
    best: list[bool]


def table_rows(results: Sequence[Result]) -> list[TableRow]:
    """The lines of the table of one or more runs on the same data; `×chance` is the first run's.

    Shares are in percent. For ranks, where lower is better, the factor is chance / rank.
    """
    first = results[0]
    rows = []
    for name, label in ROWS.items():
        if first.metrics.get(name) is None:
            continue
        values = [result.metrics.get(name) for result in results]
        known = [value for value in values if value is not None]
        chance, is_rank = first.chance.get(name), name.endswith("_rank")
        best = min(known) if is_rank else max(known)
        rows.append(
            TableRow(
                label,
                [_number(value, is_rank) for value in values],
                _number(chance, is_rank),
                _factor(known[0], chance, is_rank),
                [len(results) > 1 and value == best for value in values],
            )
        )
    return rows


def _number(value: float | None, is_rank: bool) -> str:
    if value is None:
        return "–"
    if is_rank:
        return f"{value:,.1f}"
    return f"{100 * value:.2f} %"


def _factor(value: float, chance: float | None, is_rank: bool) -> str:
    if not chance or (is_rank and not value):
        return "–"
    factor = chance / value if is_rank else value / chance
    return f"{factor:.1f}×" if factor < 99.95 else f"{factor:,.0f}×"


def _headings(results: Sequence[Result]) -> list[str]:
    names = [result.run for result in results]
    factor = "×chance" if len(names) == 1 else f"×chance ({names[0]})"
    return ["metric", *names, "chance", factor]


def terminal_table(results: Sequence[Result]) -> str:
    """The table as aligned text."""
    lines = [_headings(results), *([row.metric, *row.values, row.chance, row.factor] for row in table_rows(results))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    return "\n".join([aligned[0], "─" * len(aligned[0]), *aligned[1:]])


def print_table(results: Sequence[Result]) -> None:
    """Print the table, and under it what was evaluated."""
    print(terminal_table(results))
    print()
    for line in _facts(results):
        print(line)


def _facts(results: Sequence[Result]) -> list[str]:
    facts = []
    for result in results:
        objective = f"{result.objective}, " if result.objective else ""
        digest = result.checkpoint["sha256"][:12]
        facts.append(f"{result.run}: {objective}{result.model}, {result.checkpoint['file']} (sha256 {digest}…)")
    counts = results[0].counts
    if "pairs" in counts:
        captions = f"{counts['distinct_captions']:,} different captions"
        facts.append(f"retrieval: {counts['pairs']:,} held-out pairs with {captions}")
    if "zeroshot_images" in counts:
        facts.append(f"zero-shot: {counts['zeroshot_images']:,} images, {counts['zeroshot_classes']:,} classes")
    return facts


def markdown(results: Sequence[Result]) -> str:
    """A Markdown page: the table, what was evaluated, how to read it. With several runs the best values are bold."""
    headings = _headings(results)
    lines = [f"# Evaluation of {results[0].run}", "", _markdown_line(headings)]
    lines.append("| --- |" + " ---: |" * (len(headings) - 1))
    for row in table_rows(results):
        values = [f"**{value}**" if best else value for value, best in zip(row.values, row.best)]
        lines.append(_markdown_line([row.metric, *values, row.chance, row.factor]))
    lines += ["", *(f"- {fact}" for fact in _facts(results)), ""]
    lines += [
        "R@k: share of anchors whose partner is among the k nearest; chance is k divided by the number of candidates. "
        "“Any equal caption” also accepts a partner of another pair with the same caption, and chance says so. "
        "Ties count as random order would on average, so a model that maps everything to one point scores chance. "
        "For ranks lower is better, and the factor is chance divided by the rank.",
        "",
    ]
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_report(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write evaluation.json (the first result) and evaluation.md (all of them as columns) into a folder.

    Returns:
        The two paths.
    """
    json_path, markdown_path = folder / "evaluation.json", folder / "evaluation.md"
    # allow_nan=False: a number that is not finite must fail here, not in whoever reads the file.
    text = json.dumps(results[0]._asdict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(json_path, text + "\n")
    write_whole(markdown_path, markdown(results))
    return [json_path, markdown_path]
