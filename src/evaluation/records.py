"""Files with one JSON object per line, as training writes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The JSON objects of a file with one per line; none if the file is missing.

    Lines that are no object are left out: a run that was killed may have written half of its last line.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # also an integer of too many digits, or too deep a nesting
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def series(records: Iterable[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    """The points of y over x, in the order of x. Where a resumed run wrote an x twice, the later value holds."""
    points = {
        float(record[x]): float(record[y])
        for record in records
        if _is_number(record.get(x)) and _is_number(record.get(y))
    }
    ordered = sorted(points)
    return ordered, [points[position] for position in ordered]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
