"""One sample: as it lies in the data, and made ready for the model."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import NamedTuple

from PIL import Image

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_LARGEST_KEY = 2**63 - 1
_NAMED_SHARDS = 100


class RawSample(NamedTuple):
    """A sample before decoding.

    image: encoded bytes, the path of a file, a picture, or None when the data has none.
    caption: utf-8 bytes or text, None when the data has none.
    key: the integer key, or the bytes of the JSON object that holds it, or None.
    name: where it lies, for messages.
    """

    image: bytes | str | Image.Image | None
    caption: bytes | str | None
    key: bytes | int | None
    name: str


class BrokenSampleError(Exception):
    """A sample that cannot be used; the message is the reason, one of a handful, so that reasons can be counted."""


def from_members(members: dict[str, bytes]) -> RawSample:
    """The sample in one group of a tar file's members, as webdataset groups them (suffixes in lower case)."""
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    name = f"{members['__url__']}: {members['__key__']}"
    return RawSample(image, members.get("txt"), members.get("json"), name)


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


class Tally:
    """Counts a worker's good and skipped samples, and warns of the skipped at their 1st, 2nd, 4th, 8th, … number."""

    def __init__(self) -> None:
        self.good = 0
        self.skipped: Counter[str] = Counter()
        self.last_skipped = ""
        self._damaged: set[tuple[str, str]] = set()

    def skip(self, reason: str, name: str) -> None:
        """Counts a sample that was left out."""
        self.skipped[reason] += 1
        self.last_skipped = f"{name}: {reason}"
        total = self.skipped.total()
        if total & (total - 1) == 0:
            counts = ", ".join(f"{count} {what}" for what, count in self.skipped.most_common())
            log.warning("samples skipped so far by this worker: %s; the last is %s", counts, self.last_skipped)

    def damaged(self, url: str, problem: str) -> None:
        """Warns, once for each shard and problem and about no more than 100 in a worker, of a shard that fails."""
        self.last_skipped = f"{url}: {problem}"
        if len(self._damaged) < _NAMED_SHARDS and (url, problem) not in self._damaged:
            self._damaged.add((url, problem))
            log.warning("shard %s: %s; going on with what can be read", url, problem)
