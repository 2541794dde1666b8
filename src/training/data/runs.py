"""Which samples of an epoch are meant, as runs of positions: a few numbers where a list would hold every sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class Runs:
    """Ascending positions; as a row they are counted 0, 1, … through all runs.

    bounds: [n, 2] int64, each run's start and stop; no run is empty, and each begins after the end of the one before.
    """

    def __init__(self, bounds: np.ndarray) -> None:
        """bounds: ascending runs that do not overlap; empty ones are dropped and neighbours that touch are joined."""
        bounds = bounds[bounds[:, 0] < bounds[:, 1]]
        opens = np.ones(len(bounds), dtype=bool)
        opens[1:] = bounds[1:, 0] != bounds[:-1, 1]
        first = np.flatnonzero(opens)
        self.bounds = np.stack(
            [bounds[first, 0], bounds[np.append(first[1:], len(bounds))[: len(first)] - 1, 1]], axis=1
        )
        self._ends = np.cumsum(self.bounds[:, 1] - self.bounds[:, 0])

    @classmethod
    def of(cls, start: int, stop: int) -> Runs:
        """All positions of [start, stop)."""
        return cls(np.array([[start, stop]], dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Runs]) -> Runs:
        """Parts laid end to end, each after the one before."""
        return cls(np.concatenate([np.empty((0, 2), dtype=np.int64), *(part.bounds for part in parts)]))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each run."""
        for start, stop in self.bounds:
            yield int(start), int(stop)

    def part(self, low: int, high: int) -> Runs:
        """What [low, high) of the row is; beyond the row's end there is nothing."""
        high = min(high, len(self))
        if low >= high:
            return Runs(np.empty((0, 2), dtype=np.int64))
        first, last = (int(np.searchsorted(self._ends, at, side="right")) for at in (low, high - 1))
        bounds = self.bounds[first : last + 1].copy()
        # From the last run's end, before its start is moved: both may be the same run.
        bounds[-1, 1] -= int(self._ends[last]) - high
        bounds[0, 0] = self.bounds[first, 1] - (int(self._ends[first]) - low)
        return Runs(bounds)

    def pick(self, numbers: np.ndarray) -> Runs:
        """Single places of the row; numbers: [m] int64, ascending."""
        run = np.searchsorted(self._ends, numbers, side="right")
        positions = self.bounds[run, 1] - self._ends[run] + numbers
        return Runs(np.stack([positions, positions + 1], axis=1))

    def below(self, stop: int) -> Runs:
        """The positions smaller than `stop`."""
        return Runs(np.minimum(self.bounds, stop))

    def positions(self) -> np.ndarray:
        """[len(self)] int64, every single one."""
        shifts = self.bounds[:, 1] - self._ends
        return np.repeat(shifts, self.bounds[:, 1] - self.bounds[:, 0]) + np.arange(len(self))
