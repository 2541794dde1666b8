"""The shuffle buffer, and arriving in its middle without what has left it."""

from __future__ import annotations

import itertools
import random

import pytest

from training.data import shuffle
from training.data.shuffle import pass_over, shuffled


def assert_same_as_read_through(count: int, taken: int, size: int, seed: int) -> None:
    reading, passing = random.Random(seed), random.Random(seed)
    slots = shuffled(range(count), size, reading)
    gone = list(itertools.islice(slots, taken))
    held, read = pass_over(count, taken, size, passing)
    assert passing.getstate() == reading.getstate()
    assert sorted([*gone, *held]) == list(range(read))
    assert list(shuffled(range(read, count), size, passing, held)) == list(slots)


@pytest.mark.parametrize("first_fill", [1, 2, 7, 1000])
@pytest.mark.parametrize("drawn_at_once", [1, 3, 64, 1 << 16])
def test_passing_over_is_reading_through(first_fill: int, drawn_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "FIRST_FILL", first_fill)
    monkeypatch.setattr(shuffle, "_DRAWN_AT_ONCE", drawn_at_once)
    chance = random.Random(first_fill * 10 + drawn_at_once)
    for trial in range(150):
        count = chance.choice([1, 2, 3, 10, chance.randint(1, 400)])
        size = chance.choice([0, 1, 2, 3, 5, 10, 60, 200, count - 1, count, count + 1])
        taken = chance.choice([1, count, chance.randint(1, count)])
        assert_same_as_read_through(count, taken, size, trial)


@pytest.mark.parametrize("taken", [1, 900, 4001, 12_345, 25_999, 29_000, 30_000])
def test_the_buffer_of_a_run(taken: int) -> None:
    assert_same_as_read_through(30_000, taken, 5000, taken)


def test_more_than_there_is_cannot_have_left() -> None:
    for taken in (0, 4):
        with pytest.raises(ValueError, match=f"{taken} of 3 samples"):
            pass_over(3, taken, 2, random.Random(0))


def test_a_small_buffer_keeps_the_order() -> None:
    assert list(shuffled(range(9), 1, random.Random(0))) == list(range(9))
    assert list(shuffled(range(9), 4, random.Random(0))) != list(range(9))
