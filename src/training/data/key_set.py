"""Integer keys that have been met, as a bitmap: duplicates are found in bounded memory, whatever the number of samples."""

from __future__ import annotations

import numpy as np

_PAGE_BITS = 20
# A table by keys with more places than this (64 GiB for one number each) is no table that anyone meant.
LARGEST_KEY = 2**34 - 1


class KeySet:
    """A set of integers of 0 to LARGEST_KEY, one bit each.

    Pages of 2^20 keys (128 KiB) are made where keys lie: 125 MB for 1e9 keys without gaps, at most 2 GiB for any.
    """

    def __init__(self) -> None:
        self._pages: dict[int, np.ndarray] = {}
        self.count = 0
        self.smallest: int | None = None
        self.largest: int | None = None

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Adds keys; returns those that come twice: that were there before, or are in `keys` more than once.

        Args:
            keys: [n] int64, of 0 to LARGEST_KEY.

        Returns:
            [k] int64, ascending, each once.

        Raises:
            ValueError: a key is out of range.
        """
        if not len(keys):
            return np.empty(0, np.int64)
        ordered = np.sort(keys.astype(np.int64))
        if ordered[0] < 0 or ordered[-1] > LARGEST_KEY:
            raise ValueError(f"keys must lie in 0 to {LARGEST_KEY}, not {ordered[0]} to {ordered[-1]}")
        again = ordered[1:] == ordered[:-1]
        twice = [np.unique(ordered[1:][again])]
        different = np.concatenate([ordered[:1], ordered[1:][~again]])
        pages = different >> _PAGE_BITS
        for part in np.split(different, np.flatnonzero(np.diff(pages)) + 1):
            twice.append(self._add_to_page(int(part[0]) >> _PAGE_BITS, part))
        self._widen(int(ordered[0]), int(ordered[-1]))
        return np.unique(np.concatenate(twice))

    def update(self, other: KeySet) -> None:
        """Adds the keys of a set that has none in common with this one; the other set must not be changed afterwards."""
        for number, page in other._pages.items():
            self._pages[number] = self._pages[number] | page if number in self._pages else page
        self.count += other.count
        if other.smallest is not None and other.largest is not None:
            self._widen(other.smallest, other.largest)

    def common(self, other: KeySet) -> int | None:
        """The smallest key that is in both sets; None if there is none."""
        for number in sorted(self._pages.keys() & other._pages.keys()):
            both = self._pages[number] & other._pages[number]
            if both.any():
                bits = np.unpackbits(both, bitorder="little")
                return (number << _PAGE_BITS) + int(np.flatnonzero(bits)[0])
        return None

    def _widen(self, smallest: int, largest: int) -> None:
        self.smallest = smallest if self.smallest is None else min(self.smallest, smallest)
        self.largest = largest if self.largest is None else max(self.largest, largest)

    def _add_to_page(self, number: int, keys: np.ndarray) -> np.ndarray:
        """Adds different keys of one page; returns those that were there."""
        page = self._pages.setdefault(number, np.zeros(2**_PAGE_BITS // 8, np.uint8))
        within = keys & (2**_PAGE_BITS - 1)
        places, bits = within >> 3, np.left_shift(1, within & 7).astype(np.uint8)
        there = (page[places] & bits) != 0
        # Several of the keys may share a byte.
        np.bitwise_or.at(page, places, bits)
        self.count += len(keys) - int(there.sum())
        return keys[there]
