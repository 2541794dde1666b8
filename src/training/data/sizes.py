"""How many samples each shard holds: from sizes.json, from the tar headers, or unknown."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

from training.data.shards import READER_THREADS, Shard, local_path
from training.data.tar_headers import TarCount, count_samples
from training.errors import UserError

log = logging.getLogger(__name__)

SIZES_FILE = "sizes.json"
TOTAL_FILE = "__len__"
# Walking headers costs a seek per file of a shard; beyond this much data the user runs the index command once instead.
COUNTED_BYTES = 4 * 2**30


@dataclass(frozen=True)
class SizedShards:
    """shards with their sizes filled in where known; total samples, or None; and in words where that is known from."""

    shards: list[Shard]
    total: int | None
    origin: str

    @property
    def exact(self) -> bool:
        """True when the size of every shard is known."""
        return all(shard.size is not None for shard in self.shards)


def read_sizes_file(folder: str) -> dict[str, int]:
    """The contents of folder/sizes.json, {} when there is none.

    Raises:
        UserError: the file is not a JSON object of non-negative integers.
    """
    path = os.path.join(folder, SIZES_FILE)
    try:
        with open(path, encoding="utf-8") as stream:
            sizes = json.load(stream)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); write it with python -m training.data.index") from None
    if not isinstance(sizes, dict) or not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise UserError(
            f'{path} is not of the form {{"00000.tar": 1000}}; write it with python -m training.data.index {folder}'
        )
    return sizes


def find_sizes(sources: Sequence[Sequence[str]]) -> SizedShards:
    """Finds the size of every shard without reading a sample.

    Looks into sizes.json beside the shards; counts by tar headers what is missing there, if that is local and at most
    4 GiB in all; failing both takes the total (no sizes) from a `__len__` file beside the shards.

    Args:
        sources: URLs of the shards of each "::" source.

    Raises:
        UserError: a sizes.json or __len__ file that cannot be understood.
    """
    urls = [url for source in sources for url in source]
    files: dict[str, dict[str, int]] = {}
    sizes: dict[str, int] = {}
    for path in filter(None, map(local_path, urls)):
        folder, name = os.path.split(path)
        if folder not in files:
            files[folder] = read_sizes_file(folder)
        if name in files[folder]:
            sizes[path] = files[folder][name]
    origin = SIZES_FILE
    if len(sizes) < len({local_path(url) or url for url in urls}):
        origin = f"{SIZES_FILE} and tar headers" if sizes else "tar headers"
        sizes.update(_count_missing(urls, sizes))
    shards = [
        Shard(url, index, sizes.get(local_path(url) or url)) for index, source in enumerate(sources) for url in source
    ]
    known = [shard.size for shard in shards if shard.size is not None]
    if len(known) == len(shards):
        return SizedShards(shards, sum(known), origin)
    return SizedShards(shards, _total_of_folders(urls), TOTAL_FILE)


def _count_missing(urls: Sequence[str], sizes: dict[str, int]) -> dict[str, int]:
    """Counts the samples of the shards absent from `sizes`; {} where not all are local and small enough together."""
    missing = sorted({local_path(url) or url for url in urls} - sizes.keys())
    if any(local_path(path) is None for path in missing):
        return {}
    try:
        stats = [os.stat(path) for path in missing]
    except OSError:
        return {}
    if sum(stat.st_size for stat in stats) > COUNTED_BYTES:
        return {}
    with ThreadPoolExecutor(READER_THREADS) as pool:
        counts = list(pool.map(_count_cached, missing, [s.st_size for s in stats], [s.st_mtime_ns for s in stats]))
    for path, count in zip(missing, counts):
        if count.damage is not None:
            log.warning("%s: %s; going on with the %d samples found", path, count.damage, count.samples)
    return {path: count.samples for path, count in zip(missing, counts)}


@cache
def _count_cached(path: str, _bytes: int, _changed_ns: int) -> TarCount:
    # The checks before training and the loader ask the same question; size and time of change tell files apart.
    return count_samples(path)


def _total_of_folders(urls: Sequence[str]) -> int | None:
    """The sum of the __len__ files of the shards' folders, if each folder has one and all its tar files are used."""
    used: dict[str, set[str]] = {}
    for url in urls:
        path = local_path(url)
        if path is None:
            return None
        folder, name = os.path.split(path)
        used.setdefault(folder, set()).add(name)
    total = 0
    for folder, names in used.items():
        path = os.path.join(folder, TOTAL_FILE)
        present = {name for name in os.listdir(folder or ".") if name.endswith(".tar")}
        if not os.path.isfile(path) or present - names:
            return None
        try:
            with open(path, encoding="utf-8") as stream:
                total += int(stream.read())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} must hold the number of samples as one integer ({error}); correct it") from None
    return total
