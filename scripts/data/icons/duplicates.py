"""Pictures that are the same, and pictures that are nearly the same."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .catalogue import Icon
from .rendering import THUMBNAIL_LEVELS, Stored
from .splits import Split

if TYPE_CHECKING:
    import numpy as np

NEAR_RMSE = 0.05  # of grey values from 0 to 1
MOST_CHECKED = 1000
_SEED = 0
_BLOCK = 8192

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
    """Say how many test pictures have a near copy in training.

    A near copy's thumbnail, 32 x 32 in grey, differs by a root mean square of less than 0.05 of the range of grey.

    Args:
        train: pictures of the training split, at least one.
        test: pictures of a test split, at least one; 1,000 drawn at random are checked where there are more.
    Returns:
        Share of the checked test pictures.
    """
    import numpy as np

    checked = random.Random(_SEED).sample(list(test), min(MOST_CHECKED, len(test)))
    queries = _thumbnails(checked)
    nearest = np.full(len(checked), np.inf, np.float32)
    # All values are whole numbers below 2**24, so the sums are exact in any order and on any machine.
    query_squares = np.square(queries).sum(axis=1)
    for start in range(0, len(train), _BLOCK):
        block = _thumbnails(train[start : start + _BLOCK])
        products = queries @ block.T
        squares = query_squares[:, None] - 2 * products + np.square(block).sum(axis=1)
        nearest = np.minimum(nearest, squares.min(axis=1))
    rmse = np.sqrt(nearest / queries.shape[1]) / (THUMBNAIL_LEVELS - 1)
    return float((rmse < NEAR_RMSE).mean())


def _thumbnails(pictures: Sequence[Stored]) -> "np.ndarray":
    """Stack thumbnails: [pictures, 32 * 32] float32."""
    import numpy as np

    joined = b"".join(picture.thumbnail for picture in pictures)
    return np.frombuffer(joined, np.uint8).reshape(len(pictures), -1).astype(np.float32)
