"""What the json beside an image says of a sample; the same for training and evaluation."""

from __future__ import annotations

import json
from typing import Any

_LARGEST_KEY = 2**63 - 1
# No key that counts has more digits, and int() refuses thousands of them.
_MOST_DIGITS = 100


def json_object(text: bytes) -> dict[str, Any]:
    """A JSON object; {} for anything else, be it too deep, or a number too long, to be read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def parse_key(key: bytes | int | None) -> int | None:
    """The key of a sample, from {"key": 17} or {"key": "000017"}; None when absent or not an integer of 0 to 2^63 - 1."""
    if key is None or isinstance(key, int):
        return key
    value = json_object(key).get("key")
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS:
        value = int(value)
    return value if type(value) is int and 0 <= value <= _LARGEST_KEY else None
