"""Runs of positions against lists of them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.data.runs import Runs


def made_of(positions: list[int]) -> Runs:
    return Runs(np.array([[at, at + 1] for at in positions], dtype=np.int64).reshape(-1, 2))


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_what_the_list_is(seed: int) -> None:
    chance = random.Random(seed)
    listed = sorted(chance.sample(range(60), chance.randint(0, 50)))
    runs = made_of(listed)
    assert len(runs) == len(listed)
    assert runs.positions().tolist() == listed
    assert [at for start, stop in runs for at in range(start, stop)] == listed
    assert len(runs.bounds) == sum(at - 1 not in listed for at in listed)
    for _ in range(20):
        low, high = chance.randint(0, 60), chance.randint(0, 70)
        assert runs.part(low, high).positions().tolist() == listed[low:high]
        assert runs.below(low).positions().tolist() == [at for at in listed if at < low]
        numbers = sorted(chance.sample(range(len(listed)), chance.randint(0, len(listed))))
        assert runs.pick(np.array(numbers, dtype=np.int64)).positions().tolist() == [listed[i] for i in numbers]
        parts = [runs.part(0, low), runs.part(low, len(runs))]
        assert np.array_equal(Runs.joined(parts).bounds, runs.bounds)


def test_a_long_row_takes_no_room() -> None:
    row = Runs.joined([Runs.of(0, 10**12), Runs.of(10**12 + 1, 10**15)])
    assert len(row) == 10**15 - 1
    assert list(row.part(10**12 - 1, 10**12 + 2)) == [(10**12 - 1, 10**12), (10**12 + 1, 10**12 + 3)]
    assert len(Runs.joined([])) == 0
