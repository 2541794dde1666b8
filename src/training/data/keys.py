"""The integer keys of shards: read, checked, and written into the .json of samples that lack one.

A sample without a key gets its number: `first` + its place among all samples of all shards, in order. That depends on
nothing else, so a run that was killed goes on by being started again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.sample_json import parse_key
from training.atomic_files import discard
from training.data.key_set import LARGEST_KEY, KeySet
from training.data.key_writer import LONGEST_CHANGED, LONGEST_FACTS, KeyedShard, write_keys
from training.data.shard_pool import each_shard
from training.data.tar_members import Damage, DamagedCompressionError, LocalBytes, split_name, tar_bytes, walk
from training.errors import UserError

# In place of a key: the sample has none; its .json is no JSON object, or too long, so that none can be written into it.
NO_KEY, NO_OBJECT = -1, -2

_LEFTOVER = re.compile(r"\.(.+)\.(\d{1,9})\.tmp")


class ShardKeys(NamedTuple):
    """What one shard holds.

    keys: [samples] int64 by place in the shard, NO_KEY or NO_OBJECT where there is none.
    damage: of the file, or None.
    compressed: whether it is, whatever its name.
    """

    keys: np.ndarray
    damage: str | None = None
    compressed: bool = False


@dataclass
class FoundKeys:
    """The keys of all shards.

    Attributes:
        samples: of each shard, by path, in order.
        keys: all that samples have.
        lacking: samples without a key, by path.
        without_object: samples whose .json is no JSON object, or too long to be written to.
        problems: in words: damaged shards, keys that come twice or are too large.
    """

    samples: dict[str, int] = field(default_factory=dict)
    keys: KeySet = field(default_factory=KeySet)
    lacking: dict[str, int] = field(default_factory=dict)
    without_object: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Samples of all shards."""
        return sum(self.samples.values())

    def take(self, path: str, found: ShardKeys) -> None:
        """Adds what one shard holds; each path once."""
        if found.damage is not None:
            self.problems.append(f"{path} is damaged ({found.damage}); fetch it again")
            return
        self.samples[path] = len(found.keys)
        self.lacking[path] = int((found.keys == NO_KEY).sum())
        self.without_object += int((found.keys == NO_OBJECT).sum())
        large = found.keys > LARGEST_KEY
        if large.any():
            self.problems.append(f"{path} has a sample with the key {found.keys[large][0]}, more than {LARGEST_KEY}")
        twice = self.keys.add(found.keys[(found.keys >= 0) & ~large])
        if len(twice):
            also = f" and {len(twice) - 1} others" if len(twice) > 1 else ""
            self.problems.append(f"{path} has the key {twice[0]}{also}, which another sample has too")


def is_json_object(text: bytes) -> bool:
    """Whether a .json holds a JSON object, into which a key can be written."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_shard_keys(path: str) -> ShardKeys:
    """The keys of the samples of a local shard; images are passed over. Nothing is raised for damage."""
    keys: list[int] = []
    current, has_facts, compressed = None, False, False
    try:
        with open(path, "rb") as file:
            source = tar_bytes(file, local=True)
            compressed = not isinstance(source, LocalBytes)
            for item in walk(source):
                if isinstance(item, Damage):
                    return ShardKeys(np.empty(0, np.int64), item.detail)
                name, suffix = split_name(item.name)
                if name is None or suffix is None:
                    continue
                if name != current:
                    current, has_facts = name, False
                    keys.append(NO_KEY)
                if suffix.lower() == "json" and not has_facts:
                    has_facts = True
                    keys[-1] = _key_in(source.read(item.size)) if item.size <= LONGEST_FACTS else NO_OBJECT
    except (OSError, DamagedCompressionError) as error:
        return ShardKeys(np.empty(0, np.int64), str(error))
    return ShardKeys(np.array(keys, np.int64), None, compressed)


def read_keys(paths: Sequence[str], workers: int) -> FoundKeys:
    """The keys of all samples of local shards."""
    found = FoundKeys()
    for path, shard in each_shard(read_shard_keys, paths, workers, "reading keys"):
        found.take(path, shard)
    return found


def add_keys(paths: Sequence[str], first: int, out: str | None, workers: int) -> tuple[FoundKeys, int]:
    """Gives a key to every sample that lacks one, shard by shard into new files that take their place when they are whole.

    Nothing is written unless all shards are whole and no two samples have, or would get, the same key. Killed at any
    moment and started again it goes on with the shards that are not done.

    Args:
        paths: local shards, uncompressed.
        first: key of the very first sample, if it lacks one.
        out: folder for all shards with keys, those that lack none copied; None for the place of the old ones.
        workers: processes.

    Returns:
        What the shards hold now, by their new paths; and the number of keys written.

    Raises:
        UserError: damaged or compressed shards, keys that come twice or would.
        OSError: something cannot be written; the shards are as they were, or have their keys.
    """
    targets = _targets(paths, out)
    for folder in dict.fromkeys(map(os.path.dirname, [*targets, *([] if out is not None else paths)])):
        check_writable(folder, "--add-keys" if out is None else f"--out {out}")
    found, given = _plan(paths, first, workers)
    _remove_leftovers(targets)
    tasks = [task for task in _tasks(paths, targets, first, found) if out is not None or found.lacking[task.path]]
    if out is not None:
        os.makedirs(out, exist_ok=True)
    added = sum(written for _, written in each_shard(_convert, tasks, workers, "writing keys"))
    found.keys.update(given)
    found.lacking.clear()
    if out is not None:
        found.samples = dict(zip(targets, found.samples.values()))
    return found, added


def check_writable(folder: str, flag: str) -> None:
    """Finds out before hours of reading that a folder, or one that is still to be made, cannot be written to.

    Args:
        flag: the flag that wants it and its value, for the message.

    Raises:
        UserError: it cannot, as far as can be seen.
    """
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise UserError(f"{flag}: {there} is no folder; give another one")
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = "give --out DIR" if flag == "--add-keys" else "give another folder"
        raise UserError(f"{flag}: the folder {there} cannot be written to; {remedy}")


def _key_in(facts: bytes) -> int:
    key = parse_key(facts)
    if key is not None:
        return key
    return NO_KEY if len(facts) <= LONGEST_CHANGED and is_json_object(facts) else NO_OBJECT


def _targets(paths: Sequence[str], out: str | None) -> list[str]:
    """Where each shard is written to."""
    if out is None:
        # The file that a link points to gets the keys, and stays where it is.
        targets = [os.path.realpath(path) for path in paths]
        if len(set(targets)) < len(targets):
            raise UserError(f"no keys written: {len(targets)} shards are only {len(set(targets))} files, through links")
        return targets
    targets = [os.path.join(out, os.path.basename(path)) for path in paths]
    for path, target in zip(paths, targets):
        if os.path.realpath(path) == os.path.realpath(target):
            raise UserError(f"--out {out} is the folder of {path}: give another one, or leave --out away")
    if len(set(targets)) < len(targets):
        raise UserError(f"--out {out}: shards of several folders have the same name; number them folder by folder")
    return targets


def _plan(paths: Sequence[str], first: int, workers: int) -> tuple[FoundKeys, KeySet]:
    """What the shards hold, and the keys that will be given; raises UserError where that cannot be done."""
    found, given, begin = FoundKeys(), KeySet(), first
    for path, shard in each_shard(read_shard_keys, paths, workers, "reading keys"):
        if shard.compressed:
            found.problems.append(f"{path} is compressed; decompress it first")
        found.take(path, shard)
        numbers = begin + np.flatnonzero(shard.keys == NO_KEY)
        begin += len(shard.keys)
        if begin - 1 > LARGEST_KEY:
            raise UserError(f"--first-key {first} leads to keys of more than {LARGEST_KEY}: give a smaller one")
        given.add(numbers)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more; --verify lists all)" if len(found.problems) > 1 else ""
        raise UserError(f"no keys written: {found.problems[0]}{more}")
    clash = found.keys.common(given)
    if clash is not None:
        raise UserError(
            f"no keys written: a sample has the key {clash} already, which another one would get; "
            f"number from above the largest one with --first-key {(found.keys.largest or 0) + 1}"
        )
    return found, given


def _tasks(paths: Sequence[str], targets: Sequence[str], first: int, found: FoundKeys) -> Iterator[KeyedShard]:
    for path, target in zip(paths, targets):
        yield KeyedShard(path, target, first, found.samples[path])
        first += found.samples[path]


def _convert(shard: KeyedShard) -> int:
    """Writes a shard with keys, unless it is there already; returns the number of keys written."""
    before = read_shard_keys(shard.path).keys
    lacking = before == NO_KEY
    if os.path.realpath(shard.path) == shard.target:
        done = not lacking.any()
    else:
        done = _is_there(shard, np.where(lacking, shard.first + np.arange(len(before)), before))
    if done:
        return 0
    try:
        write_keys(shard, lacking)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # A full disk does not say of which file.
            raise OSError(f"{shard.target} cannot be written: {error.strerror}") from None
        raise
    return int(lacking.sum())


def _is_there(shard: KeyedShard, wanted: np.ndarray) -> bool:
    """Whether a target of its own has been written since the shard was, with these keys."""
    if not os.path.exists(shard.target) or os.path.getmtime(shard.target) < os.path.getmtime(shard.path):
        return False
    there = read_shard_keys(shard.target)
    return there.damage is None and np.array_equal(there.keys, wanted)


def _remove_leftovers(targets: Sequence[str]) -> None:
    """Removes half-written shards of runs that were killed."""
    names: dict[str, set[str]] = {}
    for target in targets:
        folder, name = os.path.split(target)
        names.setdefault(folder, set()).add(name)
    for folder, shards in names.items():
        with suppress(OSError):
            for entry in os.scandir(folder or "."):
                match = _LEFTOVER.fullmatch(entry.name)
                if match and match[1] in shards and not _runs(int(match[2])):
                    discard(Path(entry.path))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
