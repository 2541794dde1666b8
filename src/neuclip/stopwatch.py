"""How long parts of a training step take, on the clock of the device that does them and without waiting for it."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OBJECTIVE, NORMALIZER = "objective", "normalizer"


class Stopwatch:
    """Adds up the time of named sections, which may repeat and lie within each other.

    On a CPU a section lasts as long as the host is in it. On a GPU it lasts from the moment the device comes to its first
    operation until it is through with the last one, by a pair of events in the current stream; a CUDA graph replayed inside
    is work like any other. Pairs that the device has passed are taken off at the end of later sections, so that there are
    never more of them than the device is sections behind. While a stream is being captured nothing is timed.

    Copies and files begin with nothing: times are no part of a state.
    """

    def __init__(self) -> None:
        self._passed: defaultdict[str, float] = defaultdict(float)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    @contextmanager
    def section(self, name: str, device: torch.device) -> Iterator[None]:
        """Time the body as `name`; `device` does its work. A body that raises is not counted."""
        if device.type != "cuda":
            begin = time.perf_counter()
            yield
            self._passed[name] += time.perf_counter() - begin
        elif torch.cuda.is_current_stream_capturing():
            yield
        else:
            begin_mark = self._mark(device)
            yield
            self._pending.append((name, begin_mark, self._mark(device)))
            while self._pending and self._pending[0][2].query():
                self._take_off()

    def seconds(self) -> dict[str, float]:
        """Seconds in each section since the last restart. Waits until the device is through with the last section."""
        while self._pending:
            self._pending[0][2].synchronize()
            self._take_off()
        return dict(self._passed)

    def restart(self) -> None:
        """Begin anew; sections that the device is not through with yet are forgotten."""
        # Their events may still be ahead of the device: they are not used again.
        self._pending.clear()
        self._passed.clear()

    def _mark(self, device: torch.device) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def _take_off(self) -> None:
        """Count the oldest pair, which the device has passed."""
        name, begin, end = self._pending.popleft()
        self._passed[name] += begin.elapsed_time(end) / 1000.0
        self._spare += (begin, end)

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]
