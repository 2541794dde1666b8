"""Time between two log lines: how long a step and its parts took, and what share of it was spent without data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neuclip.stopwatch import Stopwatch
from training.data import Batch


class Interval:
    """Accounting of one interval.

    A host that queues work for a GPU is soon done and then waits for the loader, however fast that is: that says nothing.
    So on a GPU the time without data is what the GPU had nothing to do between two steps, by events in its stream; on a CPU
    it is what the host waited.

    Args:
        on_gpu: whether steps run on the current GPU.
        stopwatch: times parts of the steps; restarted with the interval.

    Attributes:
        steps: steps begun.
    """

    def __init__(self, on_gpu: bool, stopwatch: Stopwatch) -> None:
        self.on_gpu = on_gpu
        self.stopwatch = stopwatch
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.stopwatch.restart()
        self._last: torch.cuda.Event | None = None
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time that the host waited for each is added up."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, such as writing a checkpoint, is no part of the interval."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused
        # The device has been idle for a reason of its own.
        self._last = None

    def step_begins(self) -> None:
        """To be called before a step's work is queued, when its batch is there."""
        self.steps += 1
        if self._last is not None:
            self._gaps.append((self._last, _mark()))

    def step_ends(self) -> None:
        """To be called when a step's work has been queued."""
        if self.on_gpu:
            self._last = _mark()

    def seconds_per_step(self) -> float:
        """Mean over the interval so far."""
        return (time.perf_counter() - self.began) / max(1, self.steps)

    def section_seconds(self) -> dict[str, float]:
        """Of each timed part its seconds per step, mean over the interval so far. Waits for the device."""
        return {name: seconds / max(1, self.steps) for name, seconds in self.stopwatch.seconds().items()}

    def data_share(self) -> float:
        """Share of the interval without data, in [0, 1]. On a GPU the last step must have begun there: read its loss first."""
        passed = max(1e-9, time.perf_counter() - self.began)
        idle = sum(end.elapsed_time(begin) for end, begin in self._gaps) / 1000 if self.on_gpu else self.waited
        return min(1.0, idle / passed)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
