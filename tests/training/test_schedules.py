"""Learning rates by step against their closed forms, for the model and for the temperature."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from training.optim import build_optimizer, parameter_groups
from training.params import parse_args
from training.schedules import LearningRates

STEPS_PER_EPOCH = 10


class Pair(nn.Module):
    """One matrix and a logit_scale."""

    def __init__(self, log_scale: float = math.log(1 / 0.07)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.logit_scale = nn.Parameter(torch.tensor(log_scale))


def _args(*flags: str) -> Namespace:
    return parse_args(["--dataset-type", "synthetic", "--epochs", "5", "--lr", "0.1", "--warmup", "4", *flags])


def _rates(*flags: str, module: Pair | None = None) -> tuple[LearningRates, Optimizer]:
    module = module or Pair()
    args = _args(*flags)
    optimizer = build_optimizer(args, parameter_groups(module, module.logit_scale, args.wd))
    return LearningRates(optimizer, args, STEPS_PER_EPOCH, module.logit_scale), optimizer


def _curve(rates: LearningRates, name: str = "lr", steps: int = 50) -> list[float]:
    values = []
    for step in range(steps):
        rates.set(step)
        values.append(float(rates.current()[name]))
    return values


def test_cosine() -> None:
    curve = _curve(_rates()[0])
    assert curve[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    expected = [0.05 * (1 + math.cos(math.pi * (step - 4) / 46)) for step in range(4, 50)]
    assert curve[4:] == pytest.approx(expected)
    assert curve[4] == 0.1


def test_cosine_ends_at_lr_min() -> None:
    curve = _curve(_rates("--lr_min", "0.02")[0], steps=60)
    assert curve[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    expected = [0.02 + 0.04 * (1 + math.cos(math.pi * (step - 4) / 46)) for step in range(4, 50)]
    assert curve[4:50] == pytest.approx(expected)
    assert curve[50:] == pytest.approx([0.02] * 10)


def test_const() -> None:
    curve = _curve(_rates("--lr-scheduler", "const")[0])
    assert curve == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 47)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_const_cooldown(power: float) -> None:
    flags = ("--lr-scheduler", "const-cooldown", "--epochs-cooldown", "2", "--lr-cooldown-end", "0.01")
    curve = _curve(_rates(*flags, "--lr-cooldown-power", str(power))[0])
    assert curve[:30] == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 27)
    expected = [0.01 + 0.09 * ((50 - step) / 20) ** power for step in range(30, 50)]
    assert curve[30:] == pytest.approx(expected)
    assert curve[30] == pytest.approx(0.1)


def test_no_warmup_starts_at_the_peak() -> None:
    for scheduler in ("const", "cosine"):
        assert _curve(_rates("--warmup", "0", "--lr-scheduler", scheduler)[0])[0] == pytest.approx(0.1)


def test_skip_scheduler_is_constant_for_both() -> None:
    rates, _ = _rates("--skip-scheduler", "--lr_tau", "0.3", "--lr_tau_scheduler", "step_thresh")
    assert _curve(rates) == [0.1] * 50
    assert _curve(rates, "lr_tau") == [0.3] * 50


def test_warmup_longer_than_the_run_only_rises() -> None:
    curve = _curve(_rates("--warmup", "100")[0])
    assert curve == pytest.approx([0.1 * (step + 1) / 100 for step in range(50)])


def test_schedule_does_not_depend_on_where_the_run_stops() -> None:
    assert _curve(_rates()[0]) == _curve(_rates("--stop_epochs", "2")[0])


@pytest.mark.parametrize(
    ("scheduler", "warmup", "expected"),
    [
        # As published: what is constant has no warmup.
        ("const", [0.3] * 4, [0.3] * 46),
        (
            "cosine",
            [0.075, 0.15, 0.225, 0.3],
            [0.02 + 0.14 * (1 + math.cos(math.pi * (step - 4) / 46)) for step in range(4, 50)],
        ),
    ],
)
def test_temperature_has_a_schedule_of_its_own(scheduler: str, warmup: list[float], expected: list[float]) -> None:
    rates, _ = _rates("--lr_tau", "0.3", "--lr_min", "0.02", "--lr_tau_scheduler", scheduler)
    curve = _curve(rates, "lr_tau")
    assert curve[:4] == pytest.approx(warmup)
    assert curve[4:] == pytest.approx(expected)
    # The model's does not follow it.
    assert _curve(rates)[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_temperature_follows_the_model_unless_told() -> None:
    rates, _ = _rates()
    assert _curve(rates, "lr_tau") == pytest.approx(_curve(rates))


OPTIMIZERS = ("adamw", "lamb", "lion", "sgd")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("temperature", "factor"), [(0.07, 1.0), (0.0301, 1.0), (0.0299, 1 / 3), (0.03, 1 / 3), (0.01, 1 / 3)]
)
def test_step_thresh(optimizer: str, temperature: float, factor: float) -> None:
    module = Pair(-math.log(temperature))
    flags = ("--optimizer", optimizer, "--lr_tau", "0.3", "--lr_tau_scheduler", "step_thresh")
    rates, _ = _rates(*flags, module=module)
    curve = _curve(rates, "lr_tau", steps=8)
    assert curve == pytest.approx([0.3 * factor] * 8)  # no warmup, as published


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_thresh_looks_at_every_step(optimizer: str) -> None:
    module = Pair(-math.log(0.031))
    flags = ("--optimizer", optimizer, "--lr_tau", "0.3", "--lr_tau_scheduler", "step_thresh", "--warmup", "0")
    rates, _ = _rates(*flags, module=module)
    rates.set(0)
    assert float(rates.current()["lr_tau"]) == pytest.approx(0.3)
    module.logit_scale.data.fill_(-math.log(0.029))
    rates.set(1)
    assert float(rates.current()["lr_tau"]) == pytest.approx(0.1)


def test_step_thresh_leaves_the_value_on_the_device_where_it_can() -> None:
    flags = ("--lr_tau", "0.3", "--lr_tau_scheduler", "step_thresh")
    kinds: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        rates, _ = _rates("--optimizer", optimizer, *flags)
        rates.set(0)
        kinds[optimizer] = type(rates.current()["lr_tau"])
    assert kinds == {"adamw": torch.Tensor, "lamb": float, "lion": float, "sgd": torch.Tensor}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_step_thresh_scales_the_update_itself(optimizer: str) -> None:
    moved = []
    for temperature in (0.0301, 0.0299):
        module = Pair(-math.log(temperature))
        common = ("--lr_tau_scheduler", "step_thresh", "--lr_tau", "0.3", "--warmup", "0", "--momentum", "0")
        rates, built = _rates("--optimizer", optimizer, *common, module=module)
        before = module.logit_scale.item()
        module.logit_scale.grad = torch.tensor(0.5)
        rates.set(0)
        built.step()
        moved.append(before - module.logit_scale.item())
    assert moved[0] == pytest.approx(3 * moved[1], rel=1e-4)
    assert moved[0] == pytest.approx(0.3 if optimizer == "adamw" else 0.15, rel=1e-3)


def test_every_group_but_the_temperatures_follows_the_model() -> None:
    module = Pair()
    module.bias = nn.Parameter(torch.zeros(2))
    rates, optimizer = _rates("--lr_tau", "0.3", "--lr_tau_scheduler", "const", module=module)
    rates.set(20)
    found = {group["role"]: group["lr"] for group in optimizer.param_groups}
    model = 0.05 * (1 + math.cos(math.pi * 16 / 46))
    assert found == {"decay": pytest.approx(model), "no_decay": pytest.approx(model), "temperature": pytest.approx(0.3)}
