"""Pictures that are the same, and pictures that are nearly the same."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .catalogue import Icon
from .rendering import Stored
from .splits import Split

if TYPE_CHECKING:
    import numpy as np

NEAR_BITS = 8
MOST_CHECKED = 1000
_SEED = 0

Sample = tuple[Icon, Stored]


def without_equal_pixels(samples: Sequence[Sample]) -> list[Sample]:
    """Keep one icon of those with equal pixels, under its commonest concept; emoji are all kept.

    Sets take over drawings from each other and keep old names as copies; a picture in training must not be in a test.
    """
    counts = Counter(icon.key for icon, _ in samples)
    best: dict[str, tuple[int, int, int]] = {}
    for index, (icon, stored) in enumerate(samples):
        if icon.split is not Split.EMOJI:
            rank = (-counts[icon.key], len(icon.concept), index)
            best[stored.digest] = min(best.get(stored.digest, rank), rank)
    kept = {index for _, _, index in best.values()}
    return [sample for index, sample in enumerate(samples) if index in kept or sample[0].split is Split.EMOJI]


def near_duplicate_share(train: Sequence[Stored], test: Sequence[Stored]) -> float:
    """Say how many test pictures have a near copy in training: a fingerprint that differs in at most 8 of 256 bits.

    Args:
        train: pictures of the training split, at least one.
        test: pictures of a test split, at least one; 1,000 drawn at random are checked where there are more.
    Returns:
        Share of the checked test pictures.
    """
    import numpy as np

    known = _bits(train)
    checked = random.Random(_SEED).sample(list(test), min(MOST_CHECKED, len(test)))
    distances = (np.bitwise_count(known ^ row).sum(axis=1, dtype=np.int64).min() for row in _bits(checked))
    return sum(int(distance) <= NEAR_BITS for distance in distances) / len(checked)


def _bits(pictures: Sequence[Stored]) -> "np.ndarray":
    import numpy as np

    joined = b"".join(picture.fingerprint for picture in pictures)
    return np.frombuffer(joined, np.uint64).reshape(len(pictures), -1)
