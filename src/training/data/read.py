"""Reading the samples of a shard, undecoded, through webdataset's opening, tar iteration and grouping.

Tar iteration takes 60 µs a member, most of it in tarfile. Members of a local file with plain headers are read here instead;
the first that is anything else, and all that follow, are left to webdataset.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from tarfile import XHDTYPE
from typing import Any

import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from training.data.plan import ShardSlice
from training.data.samples import RawSample, from_members
from training.data.tar_headers import BLOCK, ends_archive, only_times, plain_file, sample_name

Report = Callable[[str, str], None]


class _EndOfSliceError(Exception):
    """Ends the tar iteration at the end of a slice: webdataset has no other way to stop between two members."""


class _Selector:
    """Says of each member, in file order, whether its sample is in the slice; counts as the grouping counts."""

    def __init__(self, part: ShardSlice) -> None:
        self.part = part
        self.index = -1
        self._current: str | None = None

    def __call__(self, member: str) -> bool:
        name = sample_name(member)
        if name is None:
            return False
        if name != self._current:
            self._current = name
            self.index += 1
        if self.part.stop is not None and self.index >= self.part.stop:
            raise _EndOfSliceError
        return self.part.has(self.index)


def read_groups(part: ShardSlice, report: Report) -> Iterator[dict[str, bytes]]:
    """The samples of a slice as {suffix: content}, with "__key__" and "__url__" added; other samples are not read.

    Damage ends the shard, or costs the member it is in, and is told to report(url, problem); nothing is raised.
    """
    url = part.shard.url
    selector = _Selector(part)

    def handle(error: Exception) -> bool:
        if isinstance(error, _EndOfSliceError):
            return False
        reason = str(error.args[0]).split(" @ <")[0].split("\n")[0] if error.args else ""
        report(url, f"{type(error).__name__} {reason}".strip())
        return True

    try:
        stream = webdataset.gopen(url)
    except Exception as error:
        # What opening may raise is up to the scheme: OSError, ValueError, an ImportError for hf://.
        handle(error)
        return
    try:
        yield from group_by_keys(_files(url, stream, selector, handle), handler=handle)
    finally:
        # Leaving before the end makes the command behind a pipe fail; how it ends no longer matters then.
        with contextlib.suppress(Exception):
            stream.close()
    size, found = part.shard.size, selector.index + 1
    if size is not None and part.stop is not None and found < part.stop:
        report(url, f"ends after {found} samples, {size} were counted; run python -m training.data.index again")
    elif size is not None and found > size:
        report(url, f"holds more than the {size} samples counted; run python -m training.data.index again")


def _files(url: str, stream: Any, selector: _Selector, handle: Callable[[Exception], bool]) -> Iterator[dict]:
    """Selected members, in file order, in webdataset's form."""
    # Of what webdataset opens only a local file is this; a pipe cannot be gone back in.
    if isinstance(stream, io.BufferedReader) and stream.seekable():
        try:
            for name, content in _plain_members(stream, selector):
                yield {"fname": name, "data": content, "__url__": url}
        except _EndOfSliceError:
            return
        here = stream.tell()
        if here > 0 and ends_archive(stream.read(BLOCK)):
            return
        stream.seek(here)
    yield from tar_file_expander([{"url": url, "stream": stream}], handler=handle, select_files=selector)


def _plain_members(stream: io.BufferedReader, selector: _Selector) -> Iterator[tuple[str, bytes]]:
    """Name and content of selected members as long as headers are plain; the stream is left at the first other header.

    A member that is cut short is such a one too. Content that is not selected is not read.
    """
    length = os.fstat(stream.fileno()).st_size
    while True:
        begin = stream.tell()
        header = stream.read(BLOCK)
        if header[156:157] == XHDTYPE and only_times(header, stream.read(BLOCK)):
            header = stream.read(BLOCK)
        name, size = plain_file(header) or ("", length)
        following = stream.tell() + size + -size % BLOCK
        if following > length:
            stream.seek(begin)
            return
        if selector(name):
            yield name, stream.read(size)
        stream.seek(following)


def read_slots(part: ShardSlice) -> Iterator[RawSample]:
    """What lies at the positions of a slice, in file order.

    A slice with a stop yields exactly one RawSample for each of `part.places()`, whatever the shard holds: where there is no
    whole sample, one with `problem` set. Without a stop nobody knows how many there should be: it yields the samples there
    are, and one RawSample with `problem` for each damage. Nothing is raised for damage.
    """
    problems: list[str] = []
    found = 0
    for members in read_groups(part, lambda _url, problem: problems.append(problem)):
        found += 1
        yield from_members(members)
    url = part.shard.url
    if part.stop is None:
        for problem in problems:
            yield RawSample(None, None, None, url, url, problem)
    else:
        for _ in range(len(part.places()) - found):
            yield RawSample(None, None, None, url, url, "missing from its shard")
