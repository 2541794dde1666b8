"""How far the consumers of a rank have come: what workers tell with each batch, and what the training process makes of it."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.config import Batch
from training.data.samples import Counts

log = logging.getLogger(__name__)

# Steps for which the training process can still say where consumers stood. It trains a batch or two behind what it took.
KEPT_STEPS = 16


class Progress(NamedTuple):
    """Where a consumer stands after a batch; (0, 0, 0, 0) is the beginning.

    attempt, spare: the pass it is in (see `plan.Pass`).
    taken: slots of that pass that have left the shuffle buffer, good or not.
    good: 1 if that pass has given a good sample, else 0.
    """

    attempt: int = 0
    spare: int = 0
    taken: int = 0
    good: int = 0


class Delivery(NamedTuple):
    """What a worker hands over: a batch, where the consumer stands after it, and what was counted on the way to it."""

    batch: Batch
    place_after: Progress
    counts: Counts


class History:
    """Where the consumers of a rank stood, and what they had counted, after each of the last steps of an epoch."""

    def __init__(self, step: int, places: Sequence[Progress]) -> None:
        """step: the first one to come. places: where each worker of the rank stands before it."""
        self._places = deque([list(places)], maxlen=KEPT_STEPS)
        self._counts: deque[Counts] = deque(maxlen=KEPT_STEPS)
        self._last = step
        # All that was counted up to the oldest step that is kept.
        self._good = 0
        self._left_out = 0
        self._problems: Counter[tuple[str, str]] = Counter()
        self._last_problem = ""

    def add(self, worker: int, delivery: Delivery) -> None:
        """The next step has come from a worker."""
        if len(self._places) == KEPT_STEPS and self._counts:
            self._settle(self._counts.popleft())
        places = self._places[-1].copy()
        places[worker] = delivery.place_after
        self._places.append(places)
        self._counts.append(delivery.counts)
        self._last += 1

    def places(self, step: int) -> Tensor:
        """[workers, 4] int64: attempt, spare, taken, good of each consumer after `step` steps of the epoch.

        Raises:
            ValueError: that many were not taken, or it is too long ago.
        """
        return torch.tensor(self._places[self._index(step)], dtype=torch.int64)

    def counts(self, step: int) -> Counts:
        """What was counted from the first step that came up to `step` steps of the epoch.

        Raises:
            ValueError: that many were not taken, or it is too long ago.
        """
        good, problems, last = self._good, self._problems.copy(), self._last_problem
        for counts in list(self._counts)[: self._index(step)]:
            good += counts.good
            problems.update(counts.problems)
            last = counts.last or last
        return Counts(good, dict(problems), last)

    def totals(self, step: int) -> tuple[int, int]:
        """How many of the samples that `counts` counts were good, and how many left out; cheap enough for every step.

        Raises:
            ValueError: that many were not taken, or it is too long ago.
        """
        recent = list(self._counts)[: self._index(step)]
        good = self._good + sum(counts.good for counts in recent)
        return good, self._left_out + sum(sum(counts.problems.values()) for counts in recent)

    def _settle(self, counts: Counts) -> None:
        self._left_out += sum(counts.problems.values())
        self._good += counts.good
        self._problems.update(counts.problems)
        self._last_problem = counts.last or self._last_problem

    def _index(self, step: int) -> int:
        index = step - self._last + len(self._places) - 1
        if not 0 <= index < len(self._places):
            oldest = self._last - len(self._places) + 1
            raise ValueError(f"where the data stood after step {step} is not known, only for {oldest} to {self._last}")
        return index


class ProblemLog:
    """Warns of samples left out: at the 1st, 2nd, 4th, 8th … in all, so that a log is never filled with them."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._next = 1

    def add(self, counts: Counts) -> None:
        """Counts of a batch."""
        if not counts.problems:
            return
        for (kind, _shard), number in counts.problems.items():
            self._kinds[kind] += number
        total = self._kinds.total()
        if total < self._next:
            return
        while self._next <= total:
            self._next *= 2
        kinds = ", ".join(f"{number:,} × {kind}" for kind, number in self._kinds.most_common())
        log.warning("%s samples left out so far (%s); the last one: %s", f"{total:,}", kinds, counts.last)
