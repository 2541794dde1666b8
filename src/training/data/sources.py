"""The samples of tar shards, for a consumer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from training.data.plan import Layout, Pass, Place, ShardOrder, ShardSlice, spare_slices
from training.data.read import read_slots
from training.data.runs import Runs
from training.data.samples import RawSample


class ShardSource:
    """The samples of tar shards, in the order of a plan.

    Slots are the places of a pass in the order they are read, from 0: one for each sample that should be there.
    """

    def __init__(self, order: ShardOrder) -> None:
        self.order = order

    def rest(self, layout: Layout, row: Runs) -> ShardSource:
        """What is left of an epoch, for another layout."""
        return ShardSource(self.order.rest(layout, row))

    def count(self, place: Place, which: Pass) -> int | None:
        """The slots of a pass, None where the sizes of its shards are unknown."""
        total = 0
        for part in self._slices(place, which):
            count = part.count()
            if count is None:
                return None
            total += count
        return total

    def slots(self, place: Place, which: Pass, first: int = 0) -> Iterator[RawSample]:
        """A pass from a slot on. Shards before it are not opened; a first other than 0 is for passes with a count."""
        for part in self._slices(place, which):
            if not first:
                yield from read_slots(part)
                continue
            count = part.count()
            assert count is not None
            if first < count:
                yield from read_slots(part.after(first))
            first = max(first - count, 0)

    def chosen(self, place: Place, which: Pass, numbers: np.ndarray) -> Iterator[RawSample]:
        """Single slots of a pass that has a count, opening the shards they lie in; numbers: [m] int64, ascending."""
        begin = 0
        for part in self._slices(place, which):
            count = part.count()
            assert count is not None
            low, high = np.searchsorted(numbers, [begin, begin + count])
            if low < high:
                places = part.places()
                yield from read_slots(part.only([places[number - begin] for number in numbers[low:high].tolist()]))
            begin += count

    def names(self, place: Place) -> str:
        """The shards a consumer reads in an epoch, for messages."""
        urls = list(dict.fromkeys(part.shard.url for part in self._slices(place, Pass())))
        return ", ".join(urls[:8]) + (f" and {len(urls) - 8} more" if len(urls) > 8 else "")

    def _slices(self, place: Place, which: Pass) -> Iterator[ShardSlice]:
        if which.spare:
            return spare_slices(self.order, place, which.attempt)
        return self.order.slices(place, which.attempt)
