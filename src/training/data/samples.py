"""One sample: as it lies in the data, and made ready for the model."""

from __future__ import annotations

import json
from collections import Counter
from typing import NamedTuple

from PIL import Image

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_LARGEST_KEY = 2**63 - 1


class RawSample(NamedTuple):
    """A sample before decoding.

    image: encoded bytes, the path of a file, a picture, or None when the data has none.
    caption: utf-8 bytes or text, None when the data has none.
    key: the integer key, or the bytes of the JSON object that holds it, or None.
    name: where it lies, for messages.
    shard: the file it lies in (a shard, a table), by which problems are counted.
    problem: why there is nothing to decode although a sample was expected in this place; None where there is a sample.
    """

    image: bytes | str | Image.Image | None
    caption: bytes | str | None
    key: bytes | int | None
    name: str
    shard: str = ""
    problem: str | None = None


class BrokenSampleError(Exception):
    """A sample that cannot be used; the message is the reason, one of a handful, so that reasons can be counted."""


def from_members(members: dict[str, bytes]) -> RawSample:
    """The sample in one group of a tar file's members, as webdataset groups them (suffixes in lower case)."""
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    name = f"{members['__url__']}: {members['__key__']}"
    return RawSample(image, members.get("txt"), members.get("json"), name, members["__url__"])


def parse_key(key: bytes | int | None) -> int | None:
    """The key of a sample, from {"key": 17} or {"key": "000017"}; None when absent or not an integer of 0 to 2^63 - 1."""
    if key is None or isinstance(key, int):
        return key
    try:
        found = json.loads(key)
    except ValueError:
        return None
    value = found.get("key") if isinstance(found, dict) else None
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    return value if type(value) is int and 0 <= value <= _LARGEST_KEY else None


def read_labels(raw: RawSample, needs_keys: bool) -> tuple[str, int | None]:
    """The caption and the key of a sample, which also tells whether all its parts are there.

    Raises:
        BrokenSampleError: no image, no caption, a caption that is not utf-8, or no key where one is needed.
    """
    if raw.problem is not None:
        raise BrokenSampleError(raw.problem)
    if not raw.image:
        raise BrokenSampleError("no image")
    if raw.caption is None:
        raise BrokenSampleError("no caption")
    try:
        caption = raw.caption if isinstance(raw.caption, str) else raw.caption.decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenSampleError("caption is not utf-8") from None
    key = parse_key(raw.key)
    if key is None and needs_keys:
        raise BrokenSampleError("no integer key")
    return caption, key


class Counts(NamedTuple):
    """What became of samples that were looked at.

    good: samples delivered in batches.
    problems: samples left out, by (kind, shard).
    last: the last one left out, for messages: where it lies and why; "" if there is none.
    """

    good: int
    problems: dict[tuple[str, str], int]
    last: str = ""


class Tally:
    """Counts a worker's good and skipped samples; `good` is never reset."""

    def __init__(self) -> None:
        self.good = 0
        self.last_skipped = ""
        self._drained = 0
        self._problems: Counter[tuple[str, str]] = Counter()

    def skip(self, reason: str, raw: RawSample) -> None:
        """Counts a sample that was left out."""
        self._problems[reason, raw.shard] += 1
        self.last_skipped = f"{raw.name}: {reason}"

    def drain(self) -> Counts:
        """What was counted since the last call."""
        counts = Counts(self.good - self._drained, dict(self._problems), self.last_skipped if self._problems else "")
        self._drained = self.good
        self._problems.clear()
        return counts
