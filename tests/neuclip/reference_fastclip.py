"""FastCLIP v0–v3 written down from its formulas: a dictionary per sample, loops over anchors, plain autograd, float64.

Nothing here comes from the package under test. u_i is kept itself, not its logarithm:

    u1_i ← (1−γ)·u1_i + γ·(ε + g1_i),  first visit: u1_i ← ε + g1_i;  u2_i likewise
    surrogate = ½·mean_i [ τ̃1_i·g1_i/u1_i + τ̃2_i·g2_i/u2_i ]  with u and τ̃ constant
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

BETAS = (0.9, 0.999)


@dataclass
class Sample:
    """What is kept for one sample: entry 0 as image anchor, entry 1 as text anchor."""

    u: list[float] = field(default_factory=list)
    tau: list[float] = field(default_factory=list)
    first_moment: list[float] = field(default_factory=lambda: [0.0, 0.0])
    second_moment: list[float] = field(default_factory=lambda: [0.0, 0.0])


@dataclass
class Step:
    """What one step of the reference yields; gradients by image features, text features, logit_scale (0 for v2)."""

    loss: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]
    log_u: Tensor
    estimate: Tensor


@dataclass
class ReferenceFastCLIP:
    """One of the versions "v0", "v1", "v2", "v3"."""

    version: str
    eps: float
    rho: float
    first_tau: float = 0.07
    lr_tau: float = 0.0
    samples: dict[int, Sample] = field(default_factory=dict)

    def step(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, keys: list[int], gamma: float, epoch: int
    ) -> Step:
        """One batch; the state of its samples changes."""
        size = len(keys)
        for key in keys:
            self.samples.setdefault(key, Sample(tau=[self.first_tau, self.first_tau]))
        kept = [self.samples[key] for key in keys]
        taus = [
            [torch.tensor(one.tau[k], dtype=images.dtype) if self.version == "v2" else 1 / logit_scale for k in (0, 1)]
            for one in kept
        ]
        g = [[self._g(images, texts, i, k, taus[i][k]) for k in (0, 1)] for i in range(size)]
        surrogate = torch.zeros((), dtype=images.dtype)
        for i, one in enumerate(kept):
            estimates = [self.eps + float(g[i][k].detach()) for k in (0, 1)]
            old = one.u or estimates
            one.u = [(1 - gamma) * old[k] + gamma * estimates[k] if one.u else estimates[k] for k in (0, 1)]
            for k in (0, 1):
                factor = float(taus[i][k].detach()) if self.version in ("v2", "v3") else 1.0
                surrogate = surrogate + 0.5 * factor * g[i][k] / one.u[k] / size
        log_u = torch.tensor([[math.log(one.u[k]) for one in kept] for k in (0, 1)], dtype=images.dtype)
        loss, target = self._loss(surrogate, log_u, taus, logit_scale)
        gradients = torch.autograd.grad(target, (images, texts, logit_scale), allow_unused=True)
        if self.version == "v2":
            self._move_temperatures(images, texts, keys, log_u, epoch)
        by_scale = torch.zeros_like(logit_scale) if gradients[2] is None else gradients[2]
        logs = [[math.log(self.eps + float(g[i][k].detach())) for i in range(size)] for k in (0, 1)]
        estimate = torch.tensor(logs, dtype=images.dtype)
        return Step(loss.detach(), (gradients[0], gradients[1], by_scale), log_u, estimate)

    def _g(self, images: Tensor, texts: Tensor, i: int, k: int, tau: Tensor) -> Tensor:
        anchors, others = ((images, texts), (texts, images))[k]
        own = images[i] @ texts[i]
        negatives = [j for j in range(len(images)) if j != i]
        return torch.stack([torch.exp((anchors[i] @ others[j] - own) / tau) for j in negatives]).mean()

    def _loss(
        self, surrogate: Tensor, log_u: Tensor, taus: list[list[Tensor]], logit_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The number to report, and the one to differentiate."""
        if self.version in ("v0", "v1"):
            return surrogate, surrogate
        if self.version == "v3":
            # By τ: ½·mean(log u1 + log u2) + ρ besides the part through g, which the surrogate has.
            tau = 1 / logit_scale
            return tau * (log_u.mean() + self.rho), surrogate + tau * (log_u.mean() + self.rho)
        terms = [taus[i][k] * (log_u[k, i] + self.rho) for i in range(len(taus)) for k in (0, 1)]
        return torch.stack(terms).mean(), surrogate

    def _move_temperatures(self, images: Tensor, texts: Tensor, keys: list[int], log_u: Tensor, epoch: int) -> None:
        """Gradient of τ·(log(u) + ρ) by autograd through g/u·τ, clamp, Adam by epochs, clamp."""
        for i, key in enumerate(keys):
            one = self.samples[key]
            for k in (0, 1):
                tau = torch.tensor(one.tau[k], dtype=images.dtype, requires_grad=True)
                g = self._g(images.detach(), texts.detach(), i, k, tau)
                value = one.tau[k] * g / one.u[k] + tau * (log_u[k, i] + self.rho)
                gradient = max(-5.0, min(5.0, float(torch.autograd.grad(value, tau)[0])))
                beta1, beta2 = BETAS if epoch > 0 else (0.0, 0.0)
                one.first_moment[k] = beta1 * one.first_moment[k] + (1 - beta1) * gradient
                one.second_moment[k] = beta2 * one.second_moment[k] + (1 - beta2) * gradient**2
                first = one.first_moment[k] / (1 - beta1 ** (epoch + 1))
                second = one.second_moment[k] / (1 - beta2 ** (epoch + 1))
                one.tau[k] = max(0.01, min(1.0, one.tau[k] - self.lr_tau * first / (math.sqrt(second) + 1e-8)))
