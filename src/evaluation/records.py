"""Files with one JSON object per line, as training writes them."""

from __future__ import annotations

import json
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
