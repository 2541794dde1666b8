"""One sample: as it lies in the data, and made ready for the model."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from PIL import Image

from evaluation.sample_json import json_object, parse_key

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
# A tokeniser takes time by the square of a word's length: a minute for one of 64 KiB. No caption is half as long.
LONGEST_CAPTION = 2**16  # bytes
LONGEST_WORD = 2**12


class Problem:
    """Why a sample is left out: the kinds by which it is counted.

    Of a sample:
    - NO_IMAGE, EMPTY_IMAGE: no file with a picture's suffix; one of zero bytes.
    - BAD_IMAGE: what it holds is no picture, or not a whole one, or of a format that is not decoded.
    - HUGE_IMAGE: more pixels than Pillow takes for safe (PIL.Image.MAX_IMAGE_PIXELS), by its header.
    - NO_CAPTION, EMPTY_CAPTION: neither .txt nor a "caption" in .json; one of blanks alone.
    - BAD_CAPTION, LONG_CAPTION: not utf-8; more than 64 KiB, or 4 KiB without a blank.
    - NO_KEY: no integer key, where the objective needs one.
    - HUGE_MEMBER: a picture of more than 256 MiB or a text of more than 16 MiB, which is not read.
    - TWICE: two members of the sample with the same suffix.

    Of a shard, for each sample lost by it:
    - GONE, UNREADABLE: there no longer; it cannot be opened or read.
    - NOT_TAR, EMPTY: no tar file; one without any sample.
    - TRUNCATED: it ends before its end-of-archive mark.
    - BAD_HEADER: a damaged header of a member; reading went on at the next sound one.
    - BAD_COMPRESSION: it cannot be decompressed to its end.
    - STREAM_FAILED: a stream that stalled, broke off or could not be opened, again and again.
    - FEWER: it holds fewer samples than were counted when sizes.json was written.
    """

    NO_IMAGE = "no image"
    EMPTY_IMAGE = "image is empty"
    BAD_IMAGE = "image cannot be decoded"
    HUGE_IMAGE = "image has too many pixels"
    NO_CAPTION = "no caption"
    EMPTY_CAPTION = "caption is empty"
    BAD_CAPTION = "caption is not utf-8"
    LONG_CAPTION = "caption is too long"
    NO_KEY = "no integer key"
    HUGE_MEMBER = "member is too large"
    TWICE = "member is there twice"
    GONE = "shard is gone"
    UNREADABLE = "shard cannot be read"
    NOT_TAR = "shard is not a tar file"
    EMPTY = "shard holds no sample"
    TRUNCATED = "shard is cut short"
    BAD_HEADER = "shard has a damaged header"
    BAD_COMPRESSION = "shard cannot be decompressed"
    STREAM_FAILED = "stream failed"
    FEWER = "shard holds fewer samples than counted"


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


def from_members(members: dict[str, bytes], name: str, shard: str) -> RawSample:
    """The sample in the members of a tar file that share a name.

    Args:
        members: {suffix in lower case: content}.
        name, shard: as in RawSample.
    """
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    facts = members.get("json")
    caption = members.get("txt")
    if caption is None and facts is not None:
        caption = _caption_in(facts)
    return RawSample(image, caption, facts, name, shard)


def _caption_in(facts: bytes) -> bytes | None:
    caption = json_object(facts).get("caption")
    # JSON can spell halves of characters, which are no text; as bytes they are found out with all that is not utf-8.
    return caption.encode("utf-8", "surrogatepass") if isinstance(caption, str) else None


def read_labels(raw: RawSample, needs_keys: bool) -> tuple[str, int | None]:
    """The caption and the key of a sample, which also tells whether all its parts are there.

    Raises:
        BrokenSampleError: no image, no caption, one that is blank, too long or not utf-8, or no key where one is needed.
    """
    if raw.problem is not None:
        raise BrokenSampleError(raw.problem)
    if not raw.image:
        raise BrokenSampleError(Problem.EMPTY_IMAGE if isinstance(raw.image, bytes) else Problem.NO_IMAGE)
    caption = _text(raw.caption)
    key = parse_key(raw.key)
    if key is None and needs_keys:
        raise BrokenSampleError(Problem.NO_KEY)
    return caption, key


def _text(caption: bytes | str | None) -> str:
    if caption is None:
        raise BrokenSampleError(Problem.NO_CAPTION)
    if len(caption) > LONGEST_WORD and (len(caption) > LONGEST_CAPTION or _longest_word(caption) > LONGEST_WORD):
        raise BrokenSampleError(Problem.LONG_CAPTION)
    try:
        text = caption if isinstance(caption, str) else caption.decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenSampleError(Problem.BAD_CAPTION) from None
    if not text or text.isspace():
        raise BrokenSampleError(Problem.EMPTY_CAPTION)
    return text


def _longest_word(text: bytes | str) -> int:
    return max(map(len, text.split()), default=0)


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
