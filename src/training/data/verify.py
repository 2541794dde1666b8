"""Reading shards through to the last byte, as training does, and saying what is wrong with each."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from evaluation.sample_json import json_object, parse_key
from training.atomic_files import replacing
from training.data.key_set import LARGEST_KEY, KeySet
from training.data.keys import is_json_object
from training.data.pictures import WholePictures
from training.data.plan import ShardSlice
from training.data.read import Group, read_groups
from training.data.samples import BrokenSampleError, Problem, read_labels
from training.data.shard_pool import each_shard
from training.data.shards import Shard
from training.data.sizes import SIZES_FILE, read_sizes_file
from training.data.streams import Patience

# What is wrong with a sample's key or .json, beside the kinds of Problem (of which NO_KEY is a .json without one, or none).
BAD_FACTS = "json is no JSON object"
BAD_KEY = "key is no integer of 0 to 2^63 - 1"
LARGE_KEY = f"key is more than {LARGEST_KEY}"
KEY_TWICE = "key comes twice"
# So many broken samples of a shard are named in the report, by so many characters of their names.
_NAMED, _LONGEST_NAME = 5, 200


@dataclass
class ShardReport:
    """What a shard holds.

    Attributes:
        samples: positions, broken ones included.
        pairs: samples with a whole image and caption.
        keys: how many samples have one that counts.
        smallest_key, largest_key: of those.
        problems: samples by what is wrong with them.
        damage: what is wrong with the file, in words.
        examples: the first broken samples, by name and why.
    """

    samples: int = 0
    pairs: int = 0
    keys: int = 0
    smallest_key: int | None = None
    largest_key: int | None = None
    problems: Counter[str] = field(default_factory=Counter)
    damage: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def add(self, problem: str, name: str) -> None:
        """Counts something that is wrong with a sample."""
        self.problems[problem] += 1
        if len(self.examples) < _NAMED:
            # A name may hold anything: half characters cannot be printed, and others tell a terminal what to do.
            self.examples.append(f"{ascii(name)[1:-1][:_LONGEST_NAME]}: {problem}")

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.damage

    def as_json(self, path: str) -> dict[str, Any]:
        """The shard's line in the report."""
        return {
            "shard": path,
            "sound": self.sound,
            "samples": self.samples,
            "pairs": self.pairs,
            "keys": self.keys,
            "smallest_key": self.smallest_key,
            "largest_key": self.largest_key,
            "problems": dict(sorted(self.problems.items())),
            "damage": self.damage,
            "examples": self.examples,
        }


class Verified(NamedTuple):
    """The shards by path, in order, and the keys of all their samples."""

    shards: dict[str, ShardReport]
    keys: KeySet

    @property
    def bad(self) -> dict[str, ShardReport]:
        """Those with which something is wrong."""
        return {path: report for path, report in self.shards.items() if not report.sound}

    def summary(self) -> str:
        """One line."""
        samples = sum(report.samples for report in self.shards.values())
        pairs = sum(report.pairs for report in self.shards.values())
        keys = "no keys"
        if self.keys.count:
            keys = f"{self.keys.count:,} different keys of {self.keys.smallest:,} to {self.keys.largest:,}"
        return (
            f"{len(self.shards):,} shards, {samples:,} samples, {pairs:,} whole pairs, {keys}: "
            f"{len(self.bad):,} shards are bad"
        )


def verify_shard(path: str, decode_images: bool) -> tuple[ShardReport, np.ndarray]:
    """Reads a local shard to its end. Nothing is raised for damage.

    Args:
        decode_images: decode every image too, which takes most of the time.

    Returns:
        What it holds; and [k] int64, the keys that samples have, in order.
    """
    report = ShardReport()
    keys: list[int] = []
    pictures = WholePictures(_unchanged)  # type: ignore[arg-type]
    for item in read_groups(ShardSlice(Shard(path, 0)), Patience()):
        if not isinstance(item, Group):
            if item.kind == Problem.EMPTY:
                continue  # As a downloader leaves it when none of a shard's links is alive.
            report.damage.append(f"{item.kind}: {item.detail}")
            continue
        report.samples += 1
        sample = item.sample(path)
        try:
            read_labels(sample, needs_keys=False)
            if decode_images:
                pictures.decode(sample.image)  # type: ignore[arg-type]
            report.pairs += 1
        except BrokenSampleError as broken:
            report.add(str(broken), item.name)
        key = parse_key(item.members.get("json"))
        # Of a sample that damage has taken parts of, the .json may be one of them.
        problem = _problem_of_key(item.members.get("json"), key) if sample.problem is None else None
        if problem is not None:
            report.add(problem, item.name)
        if key is not None and key <= LARGEST_KEY:
            keys.append(key)
    if keys:
        report.keys, report.smallest_key, report.largest_key = len(keys), min(keys), max(keys)
    return report, np.array(keys, np.int64)


def verify(paths: Sequence[str], decode_images: bool, workers: int) -> Verified:
    """Reads local shards through and compares their keys and their sizes.json.

    Of two samples with the same key the later one is taken to be wrong. That samples have no key is wrong only where
    others have one: not every objective needs them.

    Raises:
        UserError: a sizes.json that cannot be understood, before a shard is read.
    """
    verified = Verified({}, KeySet())
    sizes = {folder: read_sizes_file(folder) for folder in dict.fromkeys(map(os.path.dirname, paths))}
    work = functools.partial(verify_shard, decode_images=decode_images)
    for path, (report, keys) in each_shard(work, paths, workers, "verifying"):
        twice = verified.keys.add(keys)
        if len(twice):
            report.problems[KEY_TWICE] += len(twice)
            report.examples.append(f"key {twice[0]}: {KEY_TWICE}")
        folder, name = os.path.split(path)
        if sizes[folder].get(name, report.samples) != report.samples:
            report.damage.append(f"{SIZES_FILE} says {sizes[folder][name]} samples, there are {report.samples}")
        verified.shards[path] = report
    if not verified.keys.count:
        for report in verified.shards.values():
            if report.problems.pop(Problem.NO_KEY, 0):
                report.examples = [line for line in report.examples if not line.endswith(Problem.NO_KEY)]
    return verified


def write_report(verified: Verified, path: str) -> None:
    """Writes a JSON object for each shard, one a line, as `ShardReport.as_json` makes it.

    Its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as stream:
        for shard, report in verified.shards.items():
            stream.write(json.dumps(report.as_json(shard)).encode() + b"\n")


def _problem_of_key(facts: bytes | None, key: int | None) -> str | None:
    if key is not None:
        return LARGE_KEY if key > LARGEST_KEY else None
    if facts is None:
        return Problem.NO_KEY
    if not is_json_object(facts):
        return BAD_FACTS
    return BAD_KEY if json_object(facts).get("key") is not None else Problem.NO_KEY


def _unchanged(picture: Image.Image) -> Image.Image:
    return picture
