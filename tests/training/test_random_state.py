"""The generators of a process go on exactly where they were."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.random_state import rng_state, seed_generators, set_rng_state

CPU = torch.device("cpu")


def _draw(device: torch.device) -> list[Any]:
    """Something from each generator; odd numbers of Gaussians, since one may be kept for the next call."""
    drawn: list[Any] = [torch.rand(3).tolist(), torch.randn(1).tolist(), random.random(), random.gauss(0, 1)]
    drawn += [np.random.rand(), np.random.standard_normal()]  # noqa: NPY002
    if device.type == "cuda":
        drawn.append(torch.rand(3, device=device).tolist())
    return drawn


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_round_trip_through_a_file(device: str, tmp_path: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    place = torch.device(device)
    _seed(3)
    _draw(place)
    torch.save(rng_state(place), tmp_path / "state.pt")
    expected = [_draw(place) for _ in range(3)]
    _seed(4)
    assert _draw(place) != expected[0]
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True), place)
    assert [_draw(place) for _ in range(3)] == expected


def test_taking_the_state_draws_nothing_and_later_draws_do_not_change_it() -> None:
    _seed(5)
    expected = _draw(CPU)
    _seed(5)
    state = rng_state(CPU)
    assert _draw(CPU) == expected
    set_rng_state(state, CPU)
    assert _draw(CPU) == expected


@pytest.mark.parametrize("missing", ["torch", "python", "numpy"])
def test_what_is_no_state_is_refused(missing: str) -> None:
    state = rng_state(CPU)
    with pytest.raises(ValueError, match="generators"):
        set_rng_state({**state, missing: {}}, CPU)
    del state[missing]
    with pytest.raises(ValueError, match="generators"):
        set_rng_state(state, CPU)


def test_any_number_seeds_all_generators() -> None:
    drawn = []
    for number in (1, 10**40 + 7, 10**40 + 7, 2**63 + 5):
        seed_generators(number)
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
    assert drawn[1] == drawn[2]
    for kind in zip(drawn[0], drawn[1], drawn[3]):
        assert len(set(kind)) == 3
