"""γ's schedule and the mixture of two normalizers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from neuclip.normalizers import GammaSchedule, log_mix


def test_constant() -> None:
    schedule = GammaSchedule("constant", 0.3, 4.0, 10)
    assert [schedule.at(epoch, 7 * epoch) for epoch in range(4)] == [0.3] * 4


def test_cosine_changes_at_epoch_boundaries_only() -> None:
    schedule = GammaSchedule("cosine", 0.2, 4.0, 10)
    eighth = 0.5 * (1 + math.sqrt(0.5)) * 0.8 + 0.2
    expected = [1.0, eighth, 0.6, 0.2 + 0.8 - (eighth - 0.2), 0.2, 0.2, 0.2]
    for epoch, value in enumerate(expected):
        for step in (10 * epoch, 10 * epoch + 9):
            assert schedule.at(epoch, step) == pytest.approx(value, abs=1e-15)


def test_cosine_step_follows_the_same_curve_between_epochs() -> None:
    by_epoch, by_step = (GammaSchedule(kind, 0.2, 4.0, 10) for kind in ("cosine", "cosine_step"))
    for epoch in range(6):
        assert by_step.at(epoch, 10 * epoch) == by_epoch.at(epoch, 10 * epoch)
    values = [by_step.at(step // 10, step) for step in range(45)]
    assert values[0] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(values[:41]))
    assert values[20] == pytest.approx(0.6)
    assert values[40:] == [0.2] * 5


def test_decay_over_a_part_of_an_epoch() -> None:
    schedule = GammaSchedule("cosine_step", 0.0, 0.5, 10)
    assert schedule.at(0, 0) == 1.0
    assert schedule.at(0, 5) == pytest.approx(0.0, abs=1e-15)
    assert GammaSchedule("cosine", 0.0, 0.5, 10).at(1, 10) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("gamma", [1e-6, 0.1, 0.42, 0.999])
def test_log_mix_equals_the_plain_mixture(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = 5 * torch.randn(2, 100, generator=generator, dtype=torch.float64)
    expected = torch.log((1 - gamma) * a.exp() + gamma * b.exp())
    torch.testing.assert_close(log_mix(a, b, gamma), expected, rtol=1e-12, atol=1e-12)


def test_log_mix_at_the_ends_returns_one_side_untouched() -> None:
    a, b = torch.tensor([1.0, -math.inf, 200.0]), torch.tensor([2.0, 3.0, -200.0])
    assert torch.equal(log_mix(a, b, 0.0), a)
    assert torch.equal(log_mix(a, b, 1.0), b)


def test_log_mix_where_the_exponentials_are_no_float32() -> None:
    a, b = torch.tensor([200.0, -200.0, 200.0, -200.0]), torch.tensor([-200.0, 200.0, 200.0, -200.0])
    expected = [200 + math.log(0.75), 200 + math.log(0.25), 200.0, -200.0]
    torch.testing.assert_close(log_mix(a, b, 0.25), torch.tensor(expected))
