"""Small shards with faults of all kinds, and what of them must be delivered nevertheless, worked out without the reader."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image

from training.data.samples import Problem

BLOCK = 512
FORMS = {
    "ustar": (tarfile.USTAR_FORMAT, 0.0, ""),
    "gnu": (tarfile.GNU_FORMAT, 0.0, "part/"),
    "pax": (tarfile.PAX_FORMAT, 1699999999.25, ""),
    "gnu, long names": (tarfile.GNU_FORMAT, 0.0, "folder/" + "n" * 110),
    "pax, long names": (tarfile.PAX_FORMAT, 0.0, "folder/" + "n" * 110),
    "pax, letters": (tarfile.PAX_FORMAT, 0.5, "ü/"),
    "out of its folder": (tarfile.USTAR_FORMAT, 0.0, "../../"),
}
Members = list[tuple[str, bytes]]


@dataclass
class Sample:
    """name: up to the suffix. key: its number. fault: the kind of Problem it has from the start, or None."""

    name: str
    key: int
    members: Members
    fault: str | None


@dataclass
class Member:
    """Where a member of a sample lies: headers, the last of which is a block before the content, content, padding."""

    sample: int
    start: int
    content: int
    content_end: int
    end: int


@dataclass
class Shard:
    """A tar file, sound at first.

    length: of the sound file, in bytes, as are the places of members.
    touched: ranges of bytes of the sound file that are not what they were.
    ruined: samples that the faults cost something although their bytes are there.
    wild: some header says something else than before and is sound: what comes after it cannot be foretold.
    misled: a header gives a size that leads out of the file, from where only a plain file can be gone back.
    packed: compressed. harmed: by anything.
    """

    samples: list[Sample]
    members: list[Member]
    data: bytearray
    length: int
    touched: list[tuple[int, int]] = field(default_factory=list)
    ruined: set[int] = field(default_factory=set)
    wild: bool = False
    misled: bool = False
    packed: bool = False
    harmed: bool = False

    def certain(self) -> set[int]:
        """Samples that must be found as they were."""
        first = min((begin for begin, _ in self.touched), default=len(self.data))
        hurt = set(self.ruined)
        for member in self.members:
            inside = any(begin < member.end and end > member.start for begin, end in self.touched)
            if inside or (self.wild and member.end > first):
                hurt.add(member.sample)
        found = set(range(len(self.samples))) - hurt
        if self.wild and found:
            # What follows may take the name of the sample before it.
            found.discard(max(found))
        return found


@cache
def pictures() -> list[bytes]:
    """Encoded pictures of some kinds and sizes."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(24):
        size = (int(rng.integers(8, 24)), int(rng.integers(8, 24)), 3)
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(data, ("PNG", "JPEG")[number % 2])
        found.append(data.getvalue())
    return found


def _bomb() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 16) + b"IDAT" + bytes(16)


def _without(suffix: str) -> Callable[[Members, random.Random], Members]:
    return lambda members, _rng: [(s, content) for s, content in members if s != suffix]


def _with(suffix: str, *contents: bytes) -> Callable[[Members, random.Random], Members]:
    return lambda members, rng: [(s, rng.choice(contents) if s == suffix else c) for s, c in members]


def _cut_picture(members: Members, rng: random.Random) -> Members:
    return [(s, content[: rng.randrange(1, len(content) // 2)] if s == "jpg" else content) for s, content in members]


def _caption_in_json(members: Members, _rng: random.Random) -> Members:
    (_, picture), (_, caption), (_, facts) = members
    return [("jpg", picture), ("json", json.dumps(json.loads(facts) | {"caption": caption.decode()}).encode())]


def _other_members(members: Members, rng: random.Random) -> Members:
    others = [("pkl", rng.randbytes(700)), ("npz", b""), ("cls", b"3"), ("txt.bak", b"x")]
    return rng.sample(members + others, len(members) + len(others))


def _twice(members: Members, rng: random.Random) -> Members:
    return [*members, rng.choice(members)]


# By the problem that each makes: None for what looks odd and is sound.
SAMPLE_FAULTS: list[tuple[str | None, Callable[[Members, random.Random], Members]]] = [
    (Problem.NO_IMAGE, _without("jpg")),
    (Problem.NO_CAPTION, _without("txt")),
    (Problem.NO_KEY, _without("json")),
    (Problem.EMPTY_IMAGE, _with("jpg", b"")),
    (Problem.BAD_IMAGE, _with("jpg", b"not found", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff", bytes(900))),
    (Problem.BAD_IMAGE, _cut_picture),
    (Problem.HUGE_IMAGE, _with("jpg", _bomb())),
    (Problem.EMPTY_CAPTION, _with("txt", b"", b" \n", "\u3000".encode())),
    (Problem.BAD_CAPTION, _with("txt", b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80")),
    (Problem.LONG_CAPTION, _with("txt", b"x " * 40_000, b"x" * 5000)),
    (Problem.NO_KEY, _with("json", b"", b"{", b"[" * 5000, b'{"key": ' + b"9" * 5000 + b"}", b'{"key": 0.5}', b"\xff")),
    (Problem.TWICE, _twice),
    (None, _caption_in_json),
    (None, _other_members),
]


def build(rng: random.Random) -> Shard:
    """A sound tar file of a few samples, some of which have faults of their own."""
    form, mtime, prefix = FORMS[rng.choice(list(FORMS))]
    samples = []
    for key in range(rng.randrange(3, 10)):
        facts = json.dumps({"key": rng.choice([key, f"{key:09d}"])}).encode()
        members: Members = [("jpg", rng.choice(pictures())), ("txt", f"picture {key}".encode()), ("json", facts)]
        fault: str | None = None
        if rng.random() < 0.25:
            fault, change = rng.choice(SAMPLE_FAULTS)
            members = change(members, rng)
        if fault != Problem.TWICE:
            rng.shuffle(members)
        samples.append(Sample(f"{prefix}{key:05d}", key, members, fault))
    return _packed_up(samples, form, mtime)


def _packed_up(samples: list[Sample], form: int, mtime: float) -> Shard:
    file = io.BytesIO()
    places = []
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for number, sample in enumerate(samples):
            for suffix, content in sample.members:
                start = tar.offset
                entry = tarfile.TarInfo(f"{sample.name}.{suffix}")
                entry.size, entry.mtime = len(content), mtime
                tar.addfile(entry, io.BytesIO(content))
                begin = tar.offset - (len(content) + -len(content) % BLOCK)
                places.append(Member(number, start, begin, begin + len(content), tar.offset))
    return Shard(samples, places, bytearray(file.getvalue()), file.tell())


def corrupt(shard: Shard, rng: random.Random) -> None:
    """None to three faults that leave bytes where they are, and perhaps one that moves them."""
    sound = bytes(shard.data)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        rng.choice((_overwrite, _overwrite, _zero, _swap, _flip, _flip_header, _absurd_size))(shard, rng)
    _look_for_wild_headers(shard, sound)
    if rng.random() < 0.5:
        rng.choice((_cut, _cut, _insert, _insert_between, _delete, _remove_member, _double_member))(shard, rng)
    shard.harmed = bytes(shard.data) != sound


def _used(shard: Shard) -> int:
    """Bytes up to the end-of-archive mark, with that."""
    return shard.members[-1].end + 2 * BLOCK


def _overwrite(shard: Shard, rng: random.Random) -> None:
    size = rng.choice((1, 3, 40, 600, 3000))
    begin = rng.randrange(_used(shard))
    end = min(begin + size, len(shard.data))
    shard.data[begin:end] = rng.randbytes(end - begin)
    shard.touched.append((begin, end))


def _zero(shard: Shard, rng: random.Random) -> None:
    begin = rng.choice((rng.randrange(_used(shard)), rng.randrange(_used(shard) // BLOCK) * BLOCK))
    end = min(begin + rng.choice((8, BLOCK, 2 * BLOCK, 4096)), len(shard.data))
    shard.data[begin:end] = bytes(end - begin)
    shard.touched.append((begin, end))


def _swap(shard: Shard, rng: random.Random) -> None:
    one, two = (rng.randrange(_used(shard) // BLOCK) * BLOCK for _ in range(2))
    blocks = bytes(shard.data[one : one + BLOCK]), bytes(shard.data[two : two + BLOCK])
    shard.data[two : two + BLOCK], shard.data[one : one + BLOCK] = blocks
    shard.touched += [(one, one + BLOCK), (two, two + BLOCK)]


def _flip(shard: Shard, rng: random.Random) -> None:
    member = rng.choice(shard.members)
    if member.content < member.content_end:
        place = rng.randrange(member.content, member.content_end)
        shard.data[place] ^= 1 << rng.randrange(8)
        shard.touched.append((place, place + 1))


def _flip_header(shard: Shard, rng: random.Random) -> None:
    member = rng.choice(shard.members)
    place = rng.randrange(member.start, member.content)
    shard.data[place] ^= 1 << rng.randrange(8)
    shard.touched.append((place, place + 1))


def _absurd_size(shard: Shard, rng: random.Random) -> None:
    member = rng.choice(shard.members)
    begin = member.content - BLOCK
    size = rng.choice((b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"-0000001000\0", b"00000200000\0"))
    header = shard.data[begin : begin + BLOCK]
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard.data[begin : begin + BLOCK] = header
    shard.touched.append((begin, begin + BLOCK))
    shard.misled = True


def _size_of(header: bytes) -> int | None:
    """The size that tarfile reads from a header; None for one that is not sound."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except (tarfile.HeaderError, ValueError):
        return None


def _look_for_wild_headers(shard: Shard, sound: bytes) -> None:
    data = bytes(shard.data)
    for begin in range(0, len(data) - BLOCK + 1, BLOCK):
        block = data[begin : begin + BLOCK]
        if block == sound[begin : begin + BLOCK]:
            continue
        size = _size_of(block)
        # A size that leads out of the file, or before its beginning, misleads nobody.
        if size is not None and 0 <= begin + BLOCK + size <= len(data) and size >= 0:
            shard.wild = True
    for member in shard.members:
        special = (member.start, member.content - BLOCK)
        # What names and sizes are given by before a header has no checksum.
        if any(begin < special[1] and end > special[0] for begin, end in shard.touched):
            shard.wild = True


def _cut(shard: Shard, rng: random.Random) -> None:
    place = rng.randrange(_used(shard))
    shard.touched.append((place, len(shard.data)))
    del shard.data[place:]


def _insert(shard: Shard, rng: random.Random) -> None:
    place = rng.randrange(_used(shard))
    shard.data[place:place] = rng.randbytes(rng.choice((1, 100, BLOCK, 1300)))
    shard.touched.append((place, place + 1))


def _insert_between(shard: Shard, rng: random.Random) -> None:
    """Between two members nothing is touched."""
    place = rng.choice(shard.members).start
    shard.data[place:place] = rng.randbytes(rng.choice((1, 100, BLOCK, 1300)))
    if shard.wild:
        shard.touched.append((place, place + 1))


def _delete(shard: Shard, rng: random.Random) -> None:
    begin = rng.randrange(_used(shard))
    end = min(begin + rng.choice((1, 100, BLOCK, 1300)), len(shard.data))
    hit = next((member for member in shard.members if member.start <= begin < member.end), None)
    # A member that lost bytes reaches, by its size, that much into what follows it.
    reach = max(end, hit.end + end - begin) if hit is not None else len(shard.data)
    shard.touched.append((begin, reach))
    del shard.data[begin:end]


def _remove_member(shard: Shard, rng: random.Random) -> None:
    member = rng.choice(shard.members)
    shard.touched.append((member.start, member.end))
    del shard.data[member.start : member.end]


def _double_member(shard: Shard, rng: random.Random) -> None:
    member, where = rng.choice(shard.members), rng.choice(shard.members)
    shard.data[where.start : where.start] = shard.data[member.start : member.end]
    before = [other.sample for other in shard.members if other.end <= where.start]
    # In the middle of another sample it parts that in two.
    shard.ruined |= {member.sample, where.sample} if before and before[-1] == where.sample else {member.sample}
    if shard.wild:
        shard.touched.append((where.start, where.start + 1))


def pack(shard: Shard, rng: random.Random) -> None:
    """Compresses the shard, and harms what comes of it; only a cut leaves something that can be foretold."""
    inserted = max(len(shard.data) - shard.length, 0)
    data = bytearray(gzip.compress(bytes(shard.data), 1, mtime=0))
    shard.packed = shard.harmed = True
    shard.wild |= shard.misled
    how = rng.choice(("sound", "cut", "flip", "zero"))
    if how == "cut":
        data = data[: rng.randrange(len(data))]
        there = len(zlib.decompressobj(31).decompress(bytes(data))) if data else 0
        shard.touched.append((there - inserted, len(shard.data) + 1))
    elif how != "sound":
        begin = rng.randrange(len(data))
        if how == "flip":
            data[begin] ^= 1 << rng.randrange(8)
        else:
            data[begin : begin + 50] = bytes(len(data[begin : begin + 50]))
        shard.touched.append((0, len(shard.data)))
        shard.wild = True
    shard.data = data
