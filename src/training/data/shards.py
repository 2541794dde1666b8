"""From the value of --train-data to the shards it names."""

from __future__ import annotations

import glob
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.shardlists import expand_urls

from training.errors import AbsentDataError, UserError

# Threads wait for the disk or a network file system, so more of them than cores pay off.
READER_THREADS = 16


@dataclass(frozen=True)
class Shard:
    """One tar file.

    url: what webdataset opens: a path, http(s)://…, pipe:…, gs://…, hf://….
    source: index of the "::" source of --train-data it came from.
    size: its number of samples, or None where it is not known.
    """

    url: str
    source: int
    size: int | None = None


def local_path(url: str) -> str | None:
    """The path of a shard that lies in the file system, None for any other."""
    parts = urlparse(url)
    if parts.scheme == "":
        return url
    return url2pathname(parts.path) if parts.scheme == "file" else None


def expand_sources(train_data: str) -> list[list[str]]:
    """The shard URLs of each "::" source, in the order written; those of a folder or a glob are sorted.

    Raises:
        UserError: a pattern that cannot be read, names no shard at all, or names local shards that do not exist
            (AbsentDataError where none of them does).
    """
    sources = [_expand(part.strip(), train_data) for part in train_data.split("::")]
    paths = [path for urls in sources for path in map(local_path, urls) if path is not None]
    with ThreadPoolExecutor(READER_THREADS) as pool:
        missing = [path for path, there in zip(paths, pool.map(os.path.isfile, paths)) if not there]
    if missing and len(missing) == len(paths):
        raise AbsentDataError(
            f"--train-data {train_data}: no shard matches, {missing[0]} does not exist; correct the path"
        )
    if missing:
        raise UserError(
            f"--train-data {train_data}: {len(missing)} of {len(paths)} shards do not exist, the first is {missing[0]}; "
            "narrow the pattern or fetch them"
        )
    return sources


def _expand(pattern: str, train_data: str) -> list[str]:
    if os.path.isdir(pattern):
        urls = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
        if not urls:
            raise UserError(f"--train-data {train_data}: no shard matches, the folder {pattern} holds no *.tar")
        return urls
    try:
        urls = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        # webdataset asserts that ${NAME} is set in the environment as WDS_NAME; braces that do not close raise.
        raise UserError(f"--train-data {train_data}: the pattern {pattern!r} cannot be expanded ({error})") from None
    found: list[str] = []
    for url in urls:
        path = local_path(url)
        if path is not None and glob.has_magic(path) and not os.path.exists(path):
            found.extend(sorted(glob.glob(path)))
        else:
            found.append(url)
    if not found and urls:
        raise AbsentDataError(
            f"--train-data {train_data}: no shard matches {pattern!r}; give a folder, a file or a pattern"
        )
    if not all(found):
        raise UserError(f"--train-data {train_data}: no shard matches {pattern!r}; give a folder, a file or a pattern")
    return found
