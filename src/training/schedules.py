"""Learning rates by step, for the model and for the temperature."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

Schedule = Callable[[int], float]

TEMPERATURE_GROUP = "temperature"

# lr_tau_scheduler step_thresh: a third of the learning rate while the temperature is at or below this value.
TEMPERATURE_THRESHOLD = 0.03


def constant(base: float, warmup: int) -> Schedule:
    """Linear warmup over `warmup` steps, then constant."""
    return lambda step: base * min(1.0, (step + 1) / warmup) if warmup else base


def cosine(base: float, warmup: int, total: int, end: float = 0.0) -> Schedule:
    """Linear warmup, then half a cosine from `base` to `end`, reached after `total` steps."""

    def at(step: int) -> float:
        if step < warmup:
            return base * (step + 1) / warmup
        fraction = (step - warmup) / max(1, total - warmup)
        return end + 0.5 * (base - end) * (1.0 + math.cos(math.pi * min(1.0, fraction)))

    return at


def cooldown(base: float, warmup: int, total: int, length: int, end: float, power: float) -> Schedule:
    """Linear warmup, constant, and over the last `length` steps a polynomial decay to `end`."""

    def at(step: int) -> float:
        if step < warmup:
            return base * (step + 1) / warmup
        remaining = min(1.0, (total - step) / length)
        return end + (base - end) * max(0.0, remaining) ** power

    return at


class LearningRates:
    """Sets the learning rate of every parameter group before each step.

    Args:
        optimizer: its groups carry a "role"; TEMPERATURE_GROUP marks that of logit_scale.
        args: the resolved command line.
        steps_per_epoch: optimizer steps of an epoch.
        logit_scale: the parameter, log(1/τ); step_thresh looks at it.
    """

    def __init__(self, optimizer: Optimizer, args: Namespace, steps_per_epoch: int, logit_scale: Tensor) -> None:
        self.optimizer = optimizer
        self.logit_scale = logit_scale
        self.model = _model_schedule(args, steps_per_epoch)
        self.temperature = _temperature_schedule(args, steps_per_epoch)
        self.by_threshold = args.lr_tau_scheduler == "step_thresh" and not args.skip_scheduler
        # Only these accept a learning rate that lives on the device; the others have to wait for its value at each step.
        self.accepts_tensor = all(group.get("fused") for group in optimizer.param_groups)

    def set(self, step: int) -> None:
        """Set the learning rates of optimizer step `step` (from 0)."""
        for group in self.optimizer.param_groups:
            if group["role"] != TEMPERATURE_GROUP:
                group["lr"] = self.model(step)
            elif self.by_threshold:
                group["lr"] = self._thresholded(self.temperature(step))
            else:
                group["lr"] = self.temperature(step)

    def current(self) -> dict[str, Tensor | float]:
        """The learning rates now in force: lr of the model, lr_tau if the temperature is learnt."""
        rates: dict[str, Tensor | float] = {}
        for group in self.optimizer.param_groups:
            rates["lr_tau" if group["role"] == TEMPERATURE_GROUP else "lr"] = group["lr"]
        return rates

    def _thresholded(self, base: float) -> Tensor | float:
        # Worked out on the device: asking the host for τ would stop the pipeline at every step.
        log_scale = self.logit_scale.detach().float().reshape(())
        below = log_scale >= -math.log(TEMPERATURE_THRESHOLD)
        rate = torch.where(below, base / 3, base)
        return rate if self.accepts_tensor else rate.item()


def _model_schedule(args: Namespace, steps_per_epoch: int) -> Schedule:
    total = args.epochs * steps_per_epoch
    if args.skip_scheduler:
        return constant(args.lr, 0)
    if args.lr_scheduler == "cosine":
        return cosine(args.lr, args.warmup, total, args.lr_min)
    if args.lr_scheduler == "const":
        return constant(args.lr, args.warmup)
    length = args.epochs_cooldown * steps_per_epoch
    return cooldown(args.lr, args.warmup, total, length, args.lr_cooldown_end, args.lr_cooldown_power)


def _temperature_schedule(args: Namespace, steps_per_epoch: int) -> Schedule:
    if args.lr_tau_scheduler == "cosine" and not args.skip_scheduler:
        return cosine(args.lr_tau, args.warmup, args.epochs * steps_per_epoch, args.lr_min)
    # Without a warmup, as FastCLIP and AmorLIP released it: published commands have long ones, meant for the towers.
    return constant(args.lr_tau, 0)
