"""Sums in the log domain: with ε, and of a remembered normalizer with the batch's own estimate by the weight γ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCHEDULES = ("constant", "cosine", "cosine_step")


def log_or_minus_infinity(number: float) -> float:
    """The logarithm of a number ≥ 0."""
    return math.log(number) if number > 0 else -math.inf


def add_log_eps(log_means: Tensor, log_eps: float) -> Tensor:
    """log(ε + g) from log g, elementwise; log_eps may be −inf for ε = 0."""
    return torch.logaddexp(log_means, log_means.new_full((), log_eps))


def log_mix(log_remembered: Tensor, log_fresh: Tensor, gamma: float) -> Tensor:
    """log( (1−γ)·exp(log_remembered) + γ·exp(log_fresh) ), elementwise, without leaving the log domain."""
    if gamma <= 0.0:
        return log_remembered
    if gamma >= 1.0:
        return log_fresh
    return torch.logaddexp(log_remembered + math.log1p(-gamma), log_fresh + math.log(gamma))


@dataclass(frozen=True)
class GammaSchedule:
    """γ over training: constant, or a half cosine from 1 down to `gamma` (FastCLIP, arXiv 2407.01445, section 4.1).

    Attributes:
        kind: "constant"; "cosine", which changes at epoch boundaries (as published); "cosine_step", the same curve followed
            step by step.
        gamma: final value, in [0, 1].
        decay_epochs: length E of the decay in epochs, > 0; γ_t = ½(1 + cos(π·t/E))(1 − γ) + γ, then γ.
        steps_per_epoch: used by "cosine_step" to turn steps into fractions of epochs.
    """

    kind: str
    gamma: float
    decay_epochs: float
    steps_per_epoch: int

    def at(self, epoch: int, step: int) -> float:
        """γ in the given epoch (counted from 0), `step` optimizer steps after the start of training."""
        if self.kind == "constant":
            return self.gamma
        elapsed = epoch if self.kind == "cosine" else step / self.steps_per_epoch
        fraction = min(elapsed / self.decay_epochs, 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * fraction)) * (1.0 - self.gamma) + self.gamma
