"""Reading what the builders of data wrote, with nothing but the standard library."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """Hash every file of a folder, by its path in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """Read a shard: the members' content by sample and extension."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return samples


def read_split(folder: Path) -> dict[str, dict[str, bytes]]:
    """Read all shards of a folder; no sample may be in two of them."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        shard = read_tar(path)
        assert not shard.keys() & samples.keys()
        samples.update(shard)
    return samples
