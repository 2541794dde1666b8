"""Where every random number of the loader comes from.

A seed is derived from what it is for and from (seed, epoch, rank, worker, …) alone, never from what was drawn before,
so an epoch started directly is the epoch one arrives at.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Keeps the streams drawn for different purposes apart."""

    EPOCH_ORDER = 1
    OWN_SHARDS = 2
    DRAWN_SHARDS = 3
    SPARE_SHARDS = 4
    SHUFFLE_BUFFER = 5
    AUGMENTATION = 6
    SYNTHETIC_IMAGE = 7


def derive_seed(purpose: Purpose, *parts: int) -> int:
    """A 64-bit seed for `purpose`, a function of the non-negative integers `parts` and of nothing else."""
    return int(np.random.SeedSequence([int(purpose), *parts]).generate_state(1, np.uint64)[0])


@contextmanager
def seeded_augmentation(seed: int) -> Iterator[None]:
    """Runs its body with the global random generators of python, numpy and torch (CPU) seeded.

    Their states are put back afterwards: with workers=0 the training process shares them, and loading a batch must
    not shift its dropout, nor its dropout the augmentation.
    """
    # torch.manual_seed would seed the GPUs' generators too, and start CUDA's bookkeeping in a worker process.
    torch_generator = torch.default_generator
    # The global numpy generator is what third-party transforms draw from, so it is the one to seed.
    before = (random.getstate(), np.random.get_state(), torch_generator.get_state())  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch_generator.set_state(before[2])
