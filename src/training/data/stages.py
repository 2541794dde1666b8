"""Where a loader's time goes: each stage of a batch measured in the worker that runs it.

Nothing is measured unless a clock is asked for: it puts measured functions in the place of the dataset's own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from training.data.plan import Layout, Pass, Place
from training.data.runs import Runs
from training.data.samples import RawSample
from training.data.stream import BatchDataset, SampleSource

READ, DECODE, TRANSFORM, TOKENISE, COLLATE = STAGES = ("read", "decode", "transform", "tokenise", "collate")
# A whole batch, with what lies between its stages.
BATCH = "batch"
_MEASURED = (*STAGES, BATCH)


@dataclass(frozen=True)
class StageTime:
    """What a stage took, over all workers of a rank.

    Attributes:
        images: images that went through it.
        wall: seconds that passed. cpu: seconds of them in which a core worked; the others were spent waiting.
    """

    images: float = 0.0
    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: StageTime) -> StageTime:
        return StageTime(self.images + other.images, self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: StageTime) -> StageTime:
        return StageTime(self.images - other.images, self.wall - other.wall, self.cpu - other.cpu)


class StageClock:
    """Sums of time per worker and stage, in memory that all processes share."""

    def __init__(self, workers: int) -> None:
        """workers: loader processes of this rank, 0 for none."""
        self.workers = max(workers, 1)
        # Each worker writes to its own part, so none waits for a lock.
        self._sums = multiprocessing.RawArray("d", self.workers * len(_MEASURED) * 3)

    def watch(self, dataset: BatchDataset) -> None:
        """Measure this dataset from now on; to be called before it is iterated."""
        dataset.source = _TimedSource(dataset.source, self)
        dataset.decode = _Timed(dataset.decode, self, DECODE, _one)
        dataset.transform = _Timed(dataset.transform, self, TRANSFORM, _one)
        dataset.tokenizer = _Timed(dataset.tokenizer, self, TOKENISE, len)
        dataset.collate = _Timed(dataset.collate, self, COLLATE, len)
        dataset.collect = _Timed(dataset.collect, self, BATCH, _Constant(dataset.layout.batch_size))

    def add(self, stage: str, images: int, wall: float, cpu: float) -> None:
        """Counts time of the present worker."""
        info = get_worker_info()
        begin = 3 * ((0 if info is None else info.id) * len(_MEASURED) + _MEASURED.index(stage))
        self._sums[begin] += images
        self._sums[begin + 1] += wall
        self._sums[begin + 2] += cpu

    def read(self) -> dict[str, StageTime]:
        """The sums so far, over all workers, by stage; "batch" is the whole, and counts images delivered.

        More samples may have been read than were delivered, to fill the shuffle buffer.
        """
        found = dict.fromkeys(_MEASURED, StageTime())
        for worker in range(self.workers):
            for index, stage in enumerate(_MEASURED):
                begin = 3 * (worker * len(_MEASURED) + index)
                found[stage] += StageTime(*self._sums[begin : begin + 3])
        return found


class _Timed:
    """A function whose calls are measured."""

    def __init__(self, function: Callable, clock: StageClock, stage: str, count: Callable[[Any], int]) -> None:
        """count: images of a call, from its first argument."""
        self.function = function
        self.clock = clock
        self.stage = stage
        self.count = count

    def __call__(self, first: Any, *others: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return self.function(first, *others)
        finally:
            self.clock.add(self.stage, self.count(first), time.perf_counter() - wall, time.thread_time() - cpu)


class _TimedSource:
    """A source whose samples are measured one by one."""

    def __init__(self, source: SampleSource, clock: StageClock) -> None:
        self.source = source
        self.clock = clock

    def rest(self, layout: Layout, row: Runs) -> SampleSource:
        return _TimedSource(self.source.rest(layout, row), self.clock)

    def count(self, place: Place, which: Pass) -> int | None:
        return self.source.count(place, which)

    def slots(self, place: Place, which: Pass, first: int = 0) -> Iterator[RawSample]:
        return self._timed(self.source.slots(place, which, first))

    def chosen(self, place: Place, which: Pass, numbers: np.ndarray) -> Iterator[RawSample]:
        return self._timed(self.source.chosen(place, which, numbers))

    def names(self, place: Place) -> str:
        return self.source.names(place)

    def _timed(self, samples: Iterator[RawSample]) -> Iterator[RawSample]:
        following = _Timed(next, self.clock, READ, _one)
        while True:
            try:
                sample = following(samples)
            except StopIteration:
                return
            yield sample


class _Constant:
    """A number, whatever the argument; picklable, as workers may be started anew."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __call__(self, _argument: Any) -> int:
        return self.value


def _one(_argument: Any) -> int:
    return 1
