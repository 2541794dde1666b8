"""The shuffle buffer of a worker, and how to arrive in its middle without reading what has left it.

What the buffer does depends on how many samples there are and on random numbers, never on the samples. So the slots that it
still holds after the first n have left are found on slot numbers alone, and only they are read.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")
# Samples in the shuffle buffer before the first one leaves it; it grows to its full size from there.
FIRST_FILL = 1000
# Random numbers drawn at once: small enough to stay in a core's cache.
_DRAWN_AT_ONCE = 1 << 16


def shuffled(samples: Iterable[T], size: int, rng: random.Random, held: list[T] | None = None) -> Iterator[T]:
    """Every sample once, in an order shuffled within a buffer of `size`; the order itself when size is below 2.

    Args:
        samples: what comes in.
        rng: where the order comes from.
        held: what the buffer holds, to go on after samples have left it (see `pass_over`); it is used up. None begins.
    """
    incoming = iter(samples)
    buffer: list[T] = [] if held is None else held
    fill = min(size, FIRST_FILL)
    if held is not None and len(buffer) < size - 1:
        buffer.extend(_next(incoming))
    for sample in incoming:
        buffer.append(sample)
        if len(buffer) < fill:
            continue
        yield _take(buffer, rng)
        # Two come in for one that leaves until the buffer is full, so that its filling delays no batch.
        if len(buffer) < size - 1:
            buffer.extend(_next(incoming))
    while buffer:
        yield _take(buffer, rng)


def _take(buffer: list[T], rng: random.Random) -> T:
    # random() is several times as fast as randrange(), and this runs once a sample.
    index = int(rng.random() * len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def _next(incoming: Iterator[T]) -> Iterator[T]:
    for sample in incoming:
        yield sample
        return


def pass_over(count: int, taken: int, size: int, rng: random.Random) -> tuple[list[int], int]:
    """What `shuffled` would hold after samples have left it.

    Args:
        count: slots that come in, numbered from 0.
        taken: slots that have left, 1 to count.
        size: of the buffer.
        rng: as `shuffled` would begin with; it is left as `shuffled` would leave it.

    Returns:
        The numbers of the slots in the buffer, in its order, and how many slots have come in.
    """
    if not 1 <= taken <= count:
        raise ValueError(f"{taken} of {count} samples cannot have left the shuffle buffer")
    size = max(size, 1)
    draws = _Draws(rng)
    buffer = list(range(min(size, FIRST_FILL, count)))
    read = len(buffer)
    gone = 0
    while gone < taken:
        if gone and read < count and len(buffer) == size - 1:
            # Full: one comes in for each that leaves.
            steps = min(taken - gone, count - read)
            buffer = _replaced(buffer, read, steps, draws)
            read += steps
        else:
            steps = min(taken - gone, _DRAWN_AT_ONCE)
            read, steps = _step_by_step(buffer, read, count, size, draws(steps), gone > 0)
            draws.give_back(steps)
        gone += steps
    draws.leave()
    return buffer, read


def _step_by_step(
    buffer: list[int], read: int, count: int, size: int, drawn: np.ndarray, begun: bool
) -> tuple[int, int]:
    """While the buffer fills, and when nothing comes in any more. Returns slots that have come in and steps made."""
    for step, draw in enumerate(drawn.tolist()):
        if begun or step:
            if read < count and len(buffer) == size - 1:
                return read, step
            for _ in range(min(2, count - read)):
                buffer.append(read)
                read += 1
        index = int(draw * len(buffer))
        buffer[index] = buffer[-1]
        buffer.pop()
    return read, len(drawn)


def _replaced(buffer: list[int], read: int, steps: int, draws: _Draws) -> list[int]:
    """A full buffer (one place is free) after as many steps: each slot that came in is where the last draw put it."""
    size = len(buffer) + 1
    # The last place is that of the slot coming in, which may leave at once.
    places = np.array([*buffer, 0], dtype=np.int64)
    for first in range(0, steps, _DRAWN_AT_ONCE):
        number = min(_DRAWN_AT_ONCE, steps - first)
        # Of several slots assigned to the same place numpy keeps the last one.
        places[(draws(number) * size).astype(np.int64)] = np.arange(read + first, read + first + number)
    return places[:-1].tolist()


class _Draws:
    """What rng.random() is going to return, many at a time: numpy has the same generator."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        _, words, _ = rng.getstate()
        self._bits = np.random.MT19937()
        self._bits.state = {
            "bit_generator": "MT19937",
            "state": {"key": np.array(words[:-1], dtype=np.uint32), "pos": words[-1]},
        }
        self._generator = np.random.Generator(self._bits)
        self._before = self._bits.state

    def __call__(self, number: int) -> np.ndarray:
        """[number] float64."""
        self._before = self._bits.state
        return self._generator.random(number)

    def give_back(self, used: int) -> None:
        """Of the numbers drawn last only the first ones were used."""
        self._bits.state = self._before
        self._generator.random(used)

    def leave(self) -> None:
        """Brings rng to where the draws have come to."""
        state = self._bits.state["state"]
        self._rng.setstate((3, (*map(int, state["key"]), int(state["pos"])), None))
