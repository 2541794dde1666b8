"""Writing one shard anew, with a key for each sample that lacks one."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from evaluation.sample_json import parse_key
from training.atomic_files import replacing
from training.data.read import LARGEST_MEMBER
from training.data.tar_members import BLOCK, Damage, LocalBytes, Member, parse_header, split_name, walk

# A larger .json is not read by the loader either; and into one of an eighth of that a key is written: written anew with
# escapes it takes three times the bytes at most.
LONGEST_FACTS = LARGEST_MEMBER["json"]  # bytes
LONGEST_CHANGED = LONGEST_FACTS // 8
_CHUNK = 2**20


class KeyedShard(NamedTuple):
    """A shard to be written: from path to target (which may be the same), the key of its first sample, its samples."""

    path: str
    target: str
    first: int
    samples: int


def write_keys(shard: KeyedShard, lacking: np.ndarray) -> None:
    """Copies an uncompressed shard; the .json of samples that lack a key gets one, or is made, as the sample's last member.

    The new file takes its name when it is whole and on the disk. All else stays byte for byte, headers, links and what
    lies after the end included; so do the shard's permissions and, where that is allowed, its owner.

    Args:
        lacking: [samples] bool, by place in the shard.

    Raises:
        OSError: the shard cannot be read or written, or is no longer what it was; what lies at the target is untouched.
    """
    with open(shard.path, "rb") as file, replacing(Path(shard.target)) as stream:
        status = os.fstat(file.fileno())
        with suppress(OSError):  # Not every file system has them, and not every user may give files away.
            os.fchmod(stream.fileno(), stat.S_IMODE(status.st_mode))
            os.fchown(stream.fileno(), status.st_uid, status.st_gid)
        copy = _Copy(file, stream, shard, lacking)
        for item in walk(LocalBytes(file)):
            if isinstance(item, Damage):
                raise OSError(f"{shard.path} has been changed: {item.detail}")
            copy.take(item)
        copy.finish(status.st_size)


def with_key(facts: bytes, key: int) -> bytes:
    """A JSON object with the key added; what it holds otherwise stays as it is written.

    A "key" that is no integer is kept as "original_key".
    """
    found = json.loads(facts)
    if "key" not in found:
        inside = facts.rstrip()[:-1].rstrip()
        changed = inside + (b", " if found else b"") + b'"key": %d}' % key
        # JSON may also come in utf-16.
        if parse_key(changed) == key:
            return changed
        return json.dumps(found | {"key": key}).encode("ascii")
    return json.dumps(found | {"key": key, "original_key": found["key"]}).encode("ascii")


class _Copy:
    """The new tar file as far as it is written: all of the old one up to a place, and what was put in."""

    def __init__(self, file: BinaryIO, stream: BinaryIO, shard: KeyedShard, lacking: np.ndarray) -> None:
        """file: the old one; it may be moved about in between two members. stream: the new one."""
        self._file = file
        self._stream = stream
        self._shard = shard
        self._lacking = lacking
        self._time = int(os.fstat(file.fileno()).st_mtime)
        self._copied = 0
        self._name: str | None = None
        self._place = -1
        self._lacks = False
        # Where the last member of the present sample ends, and the headers of the next member begin.
        self._end = 0

    def take(self, member: Member) -> None:
        """Goes on to the next member, at whose content the file stands."""
        content = self._file.tell()
        name, suffix = split_name(member.name)
        if name is None or suffix is None:
            return
        if name != self._name:
            self._end_sample()
            self._begin_sample(name)
        self._end = content + _padded(member.size)
        if self._lacks and suffix.lower() == "json":
            self._change(member, content)
            self._lacks = False

    def finish(self, size: int) -> None:
        """Ends the last sample and copies the rest of the old file, whose size this is in bytes."""
        self._end_sample()
        if self._place + 1 != self._shard.samples:
            raise OSError(f"{self._shard.path} has been changed: {self._place + 1} samples, not {self._shard.samples}")
        self._copy_to(size)

    @property
    def _key(self) -> int:
        return self._shard.first + self._place

    def _begin_sample(self, name: str) -> None:
        self._name = name
        self._place += 1
        self._lacks = self._place < len(self._lacking) and bool(self._lacking[self._place])

    def _end_sample(self) -> None:
        if not self._lacks:
            return
        self._copy_to(self._end)
        facts = b'{"key": %d}' % self._key
        entry = tarfile.TarInfo(f"{self._name}.json")
        entry.size, entry.mtime = len(facts), self._time
        self._stream.write(entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + _with_padding(facts))
        self._lacks = False

    def _change(self, member: Member, content: int) -> None:
        """Puts a .json with a key in the place of one without; its header stays but for size and checksum."""
        where = f"{self._shard.path}: {member.name}"
        try:
            facts = with_key(self._file.read(member.size), self._key)
        except RecursionError:
            raise OSError(f"{where} is nested too deeply for a key to be written: leave the sample out") from None
        self._copy_to(content - BLOCK)
        header = self._file.read(BLOCK)
        found = parse_header(header)
        if found is None or found.size != member.size:
            # A header before this one gives the size, as for members of 8 GiB.
            raise OSError(f"{where} has its size in a pax header: unpack the shard and pack it again")
        self._stream.write(_resized(header, len(facts)) + _with_padding(facts))
        self._copied = content + _padded(member.size)

    def _copy_to(self, end: int) -> None:
        """Copies the old file up to this byte, and stands there."""
        self._file.seek(self._copied)
        while self._copied < end:
            part = self._file.read(min(end - self._copied, _CHUNK))
            if not part:
                raise OSError(f"{self._shard.path} has been changed: it has become shorter")
            self._stream.write(part)
            self._copied += len(part)


def _resized(header: bytes, size: int) -> bytes:
    """A header with another size, in bytes."""
    sized = header[:124] + b"%011o\0" % size + header[136:]
    # The sum is taken with eight blanks in place of the checksum itself.
    total = sum(sized[:148] + b" " * 8 + sized[156:])
    return sized[:148] + b"%06o\0 " % total + sized[156:]


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _with_padding(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)
