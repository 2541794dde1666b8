"""Writing one shard anew, with a key for each sample that lacks one."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.sample_json import parse_key
from training.atomic_files import replacing
from training.data.tar_members import Damage, Member, TarBytes, split_name, tar_bytes, walk

# A larger .json is not read by the loader either.
LONGEST_FACTS = 16 * 2**20  # bytes


class KeyedShard(NamedTuple):
    """A shard to be written: from path to target (which may be the same), the key of its first sample, its samples."""

    path: str
    target: str
    first: int
    samples: int


def write_keys(shard: KeyedShard, lacking: np.ndarray) -> None:
    """Copies a shard member by member; the .json of samples that lack a key gets one, or is made, as the sample's last member.

    The new file takes its name when it is whole and on the disk. Names, order and contents of all regular members stay
    as they are (times and owners within the tar file do not); permissions of the shard stay.

    Args:
        lacking: [samples] bool, by place in the shard.

    Raises:
        OSError: the shard cannot be read or written, or is no longer what it was; what lies at the target is untouched.
    """
    with open(shard.path, "rb") as file, replacing(Path(shard.target)) as stream:
        status = os.fstat(file.fileno())
        os.fchmod(stream.fileno(), stat.S_IMODE(status.st_mode))
        with tarfile.open(
            fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            copy = _Copy(tar, shard, lacking, int(status.st_mtime))
            source = tar_bytes(file, local=True)
            for item in walk(source):
                if isinstance(item, Damage):
                    raise OSError(f"{shard.path} has been changed: {item.detail}")
                copy.take(item, source)
            copy.finish()


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
    """The new tar file as far as it is written."""

    def __init__(self, tar: tarfile.TarFile, shard: KeyedShard, lacking: np.ndarray, time: int) -> None:
        """time: of change of the new members, seconds since 1970."""
        self._tar = tar
        self._shard = shard
        self._lacking = lacking
        self._time = time
        self._name: str | None = None
        self._place = -1
        self._lacks = False

    def take(self, member: Member, source: TarBytes) -> None:
        """Writes the next member, from a source that stands at its content."""
        name, suffix = split_name(member.name)
        if name is not None and name != self._name:
            self._end_sample()
            self._begin_sample(name)
        if self._lacks and name is not None and suffix is not None and suffix.lower() == "json":
            self._add(member.name, with_key(source.read(member.size), self._key))
            self._lacks = False
            return
        entry = self._entry(member.name, member.size)
        self._tar.addfile(entry, source)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Ends the last sample."""
        self._end_sample()
        if self._place + 1 != self._shard.samples:
            raise OSError(f"{self._shard.path} has been changed: {self._place + 1} samples, not {self._shard.samples}")

    @property
    def _key(self) -> int:
        return self._shard.first + self._place

    def _begin_sample(self, name: str) -> None:
        self._name = name
        self._place += 1
        self._lacks = self._place < len(self._lacking) and bool(self._lacking[self._place])

    def _end_sample(self) -> None:
        if self._lacks:
            self._add(f"{self._name}.json", b'{"key": %d}' % self._key)
            self._lacks = False

    def _add(self, name: str, content: bytes) -> None:
        self._tar.addfile(self._entry(name, len(content)), BytesIO(content))

    def _entry(self, name: str, size: int) -> tarfile.TarInfo:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime = size, self._time
        return entry
