"""Reading the samples of a shard, undecoded, through webdataset's opening, tar iteration and grouping."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from training.data.plan import Place, ShardOrder, ShardSlice, spare_slices
from training.data.samples import RawSample, Tally, from_members
from training.data.tar_headers import sample_name

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
        return self.index >= self.part.start and (self.index - self.part.start) % self.part.step == 0


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
        files = tar_file_expander([{"url": url, "stream": stream}], handler=handle, select_files=selector)
        yield from group_by_keys(files, handler=handle)
    finally:
        # Leaving before the end makes the command behind a pipe fail; how it ends no longer matters then.
        with contextlib.suppress(Exception):
            stream.close()
    size, found = part.shard.size, selector.index + 1
    if size is not None and part.stop is not None and found < part.stop:
        report(url, f"ends after {found} samples, {size} were counted; run python -m training.data.index again")
    elif size is not None and found > size:
        report(url, f"holds more than the {size} samples counted; run python -m training.data.index again")


class ShardSource:
    """The samples of tar shards, in the order of a plan."""

    def __init__(self, order: ShardOrder) -> None:
        self.order = order

    def samples(self, place: Place, attempt: int, tally: Tally) -> Iterator[RawSample]:
        """A consumer's samples of an epoch, once through."""
        return self._read(self.order.slices(place, attempt), tally)

    def spares(self, place: Place, attempt: int, tally: Tally) -> Iterator[RawSample]:
        """Samples from elsewhere in the data, for a consumer whose own part holds none that is whole."""
        return self._read(spare_slices(self.order, place, attempt), tally)

    def names(self, place: Place) -> str:
        """The shards a consumer reads in an epoch, for messages."""
        urls = list(dict.fromkeys(part.shard.url for part in self.order.slices(place, 0)))
        return ", ".join(urls[:8]) + (f" and {len(urls) - 8} more" if len(urls) > 8 else "")

    def _read(self, parts: Iterator[ShardSlice], tally: Tally) -> Iterator[RawSample]:
        for part in parts:
            for members in read_groups(part, tally.damaged):
                yield from_members(members)
