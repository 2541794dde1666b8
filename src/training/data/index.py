"""Writes sizes.json beside tar shards, from which epochs are planned exactly.

    python -m training.data.index '/data/cc3m/{00000..00331}.tar'

Every shard is walked from the first header to the end-of-archive mark. If one is damaged, it is named, nothing is
written, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training.atomic_files import replacing
from training.data.shards import READER_THREADS, expand_sources, local_path
from training.data.sizes import SIZES_FILE, read_sizes_file
from training.data.tar_headers import count_samples
from training.errors import UserError


def write_index(train_data: str) -> dict[str, dict[str, int]]:
    """Counts the samples of local shards and writes sizes.json into each of their folders.

    Entries of an existing sizes.json for other shards are kept while those shards exist.

    Args:
        train_data: as for --train-data: patterns, globs or folders, joined by "::".

    Returns:
        {folder: {name of the shard: samples}}, what was counted.

    Raises:
        UserError: shards that are missing, not local, or damaged; nothing has been written.
    """
    paths: list[str] = []
    for url in (url for source in expand_sources(train_data) for url in source):
        path = local_path(url)
        if path is None:
            raise UserError(f"{url} is not a local file: run the index command where the shards lie")
        paths.append(path)
    with ThreadPoolExecutor(READER_THREADS) as pool:
        counts = list(pool.map(count_samples, paths))
    bad = [f"{path} ({count.damage})" for path, count in zip(paths, counts) if count.damage is not None]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} shards are damaged, no {SIZES_FILE} written; fetch them again: "
            + ", ".join(bad)
        )
    found: dict[str, dict[str, int]] = {}
    for path, count in zip(paths, counts):
        folder, name = os.path.split(path)
        found.setdefault(folder, {})[name] = count.samples
    for folder, sizes in found.items():
        _write_sizes(folder, sizes)
    return found


def _write_sizes(folder: str, sizes: dict[str, int]) -> None:
    try:
        before = read_sizes_file(folder)
    except UserError:
        before = {}  # This command is the remedy for a sizes.json that cannot be understood.
    kept = {name: samples for name, samples in before.items() if os.path.isfile(os.path.join(folder, name))}
    content = json.dumps(dict(sorted((kept | sizes).items())), indent=1) + "\n"
    with replacing(Path(folder) / SIZES_FILE) as stream:  # a reader never sees half a file
        stream.write(content.encode("utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.data.index", description=__doc__.splitlines()[0])
    parser.add_argument("pattern", help="the shards, written as for --train-data")
    try:
        found = write_index(parser.parse_args(arguments).pattern)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for folder, sizes in found.items():
        empty = sorted(name for name, samples in sizes.items() if samples == 0)
        note = f" ({len(empty)} without any: {', '.join(empty[:5])})" if empty else ""
        print(f"{os.path.join(folder, SIZES_FILE)}: {len(sizes)} shards, {sum(sizes.values()):,} samples{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
