"""Which keys come twice, against Python's own sets, and the memory that the answer takes."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from training.data.key_set import LARGEST_KEY, KeySet


def test_duplicates_are_those_of_a_plain_set() -> None:
    random = np.random.default_rng(3)
    keys, seen = KeySet(), Counter()
    for _ in range(30):
        # Crowded and far apart, over borders of pages.
        near = random.integers(2**20 - 300, 2**20 + 300, 20)
        far = random.integers(0, LARGEST_KEY, 5, endpoint=True)
        part = np.concatenate([near, far])
        expected = sorted({int(key) for key, number in Counter(part.tolist()).items() if number > 1 or seen[key]})
        assert keys.add(part).tolist() == expected
        seen.update(part.tolist())
    assert keys.count == len(seen)
    assert (keys.smallest, keys.largest) == (min(seen), max(seen))


def test_common_keys_and_union() -> None:
    one, other = KeySet(), KeySet()
    one.add(np.array([1, 2**21 + 7, LARGEST_KEY]))
    other.add(np.array([0, 2**21 + 8]))
    assert one.common(other) is None
    third = KeySet()
    third.add(np.array([2**21 + 7, LARGEST_KEY]))
    assert one.common(third) == 2**21 + 7
    one.update(other)
    assert (one.count, one.smallest, one.largest) == (5, 0, LARGEST_KEY)
    assert one.add(np.array([2**21 + 8, 9])).tolist() == [2**21 + 8]


@pytest.mark.parametrize("key", [-1, LARGEST_KEY + 1])
def test_keys_out_of_range(key: int) -> None:
    with pytest.raises(ValueError, match="must lie in 0 to"):
        KeySet().add(np.array([3, key]))


def test_memory_is_a_bit_for_each_key() -> None:
    """20 million keys, shard by shard: 2.5 MB of bitmap, where a Python set takes a gigabyte."""
    tracemalloc.start()
    keys = KeySet()
    for begin in range(0, 20_000_000, 1_000_000):
        assert not len(keys.add(np.arange(begin, begin + 1_000_000)))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert keys.count == 20_000_000
    assert 2_400_000 < size < 3_500_000
