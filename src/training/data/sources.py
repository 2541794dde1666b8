"""The samples of tar shards, for a consumer."""

from __future__ import annotations

from collections.abc import Iterator

from training.data.plan import Place, ShardOrder, ShardSlice, spare_slices
from training.data.read import read_slots
from training.data.samples import RawSample, Tally


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
            yield from read_slots(part)
