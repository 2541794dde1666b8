"""Tar shards, byte for byte the same whenever and wherever they are written."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Members = Mapping[str, bytes]  # extension -> content of one sample


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, mappings in the order given."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shards(
    folder: Path, samples: Iterator[tuple[str, Members]], shard_names: Sequence[str], per_shard: int
) -> None:
    """Write samples into shards in the webdataset layout: the members of a sample follow each other.

    Args:
        folder: an existing folder.
        samples: pairs of a sample's key (its file names without extension) and its members.
        shard_names: one file name per shard; all are written, the last one with what is left.
        per_shard: samples in every shard but the last.
    """
    for shard_name in shard_names:
        # TarInfo leaves time, owner and group at zero, so nothing of this machine gets in; ustar has no extra headers.
        with tarfile.open(folder / shard_name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _, (key, members) in zip(range(per_shard), samples):
                for extension, content in members.items():
                    entry = tarfile.TarInfo(f"{key}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def shard_sizes(total: int, per_shard: int, name: str) -> dict[str, int]:
    """Name the shards for `total` samples and say how many each holds; `name` is a format such as "{:05d}.tar"."""
    starts = range(0, total, per_shard)
    return {name.format(index): min(per_shard, total - start) for index, start in enumerate(starts)}
