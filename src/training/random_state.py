"""The states of all random number generators that a training process may draw from, as tensors and plain values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state(device: torch.device) -> dict[str, Any]:
    """The generators of PyTorch (CPU, and that of `device` if it is a GPU), of Python's `random` and of numpy.

    Returns:
        "torch": [n] uint8, in host memory like all of it. "cuda": [m] uint8, or None.
        "python": {"version": int, "words": [625] int64, "gauss": float or None}.
        "numpy": {"words": [624] int64, "position": int, "has_gauss": int, "gauss": float}.
        torch.load(weights_only=True) reads it back.
    """
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002  (what augmentations of others draw from)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "words": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "position": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
    }


def seed_generators(number: int) -> None:
    """Seed all generators of the host, and those of all GPUs, from one number of 0 or more, however large."""
    torch.manual_seed(number % 2**63)
    random.seed(number)
    np.random.seed(np.random.SeedSequence(number).generate_state(4))  # noqa: NPY002  (what others draw from)


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on drawing where `rng_state` was called. A GPU's generator is left as it is where the state has none, and back.

    Raises:
        ValueError: the state is none of `rng_state`; some generators may have been set.
    """
    try:
        torch.set_rng_state(state["torch"])
        if device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], device)
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        numpy = state["numpy"]
        words = np.asarray(numpy["words"].tolist(), dtype=np.uint32)
        legacy = ("MT19937", words, numpy["position"], numpy["has_gauss"], numpy["gauss"])
        np.random.set_state(legacy)  # noqa: NPY002  (as above)
    except (KeyError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise ValueError(f"no state of random number generators: {error}") from error
