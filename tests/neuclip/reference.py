"""NeuCLIP written down from its formulas: loops over anchors, plain autograd, float64, no log domain, one process.

Nothing here comes from the package under test. With e1_i, e2_i the image and text features of sample i, s_ij = e1_i·e2_j:

    g1_i = 1/(N−1) Σ_{j≠i} exp((s_ij − s_ii)/τ)                     g2_i = 1/(N−1) Σ_{j≠i} exp((s_ji − s_ii)/τ)
    α1_i = log(ε + 1/m Σ_j exp((cos(e1_i, W1_j) − s_ii)/τ))         α2_i = log(ε + 1/m Σ_j exp((cos(e2_i, W2_j) − s_ii)/τ))
    F = ½·mean_i τ·[ exp(−α1_i)·(ε+g1_i) + α1_i − 1 + exp(−α2_i)·(ε+g2_i) + α2_i − 1 ] + τ·ρ
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def batch_g(images: Tensor, texts: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """g1 and g2 over the batch, [N] each."""
    size = images.shape[0]
    g1, g2 = [], []
    for i in range(size):
        own = images[i] @ texts[i]
        negatives = [j for j in range(size) if j != i]
        g1.append(torch.exp((texts[negatives] @ images[i] - own) / tau).sum() / (size - 1))
        g2.append(torch.exp((images[negatives] @ texts[i] - own) / tau).sum() / (size - 1))
    return torch.stack(g1), torch.stack(g2)


def batch_global_loss(images: Tensor, texts: Tensor, tau: Tensor, eps: float, rho: float) -> Tensor:
    """½·mean_i τ·[log(ε+g1_i) + log(ε+g2_i)] + τ·ρ with g over the batch."""
    g1, g2 = batch_g(images, texts, tau)
    return 0.5 * (tau * (torch.log(eps + g1) + torch.log(eps + g2))).mean() + tau * rho


def predicted(anchors: Tensor, own: Tensor, prototypes: Tensor, tau: Tensor, eps: float) -> Tensor:
    """α of the anchors of one modality, [N]."""
    alphas = []
    for i in range(anchors.shape[0]):
        cosines = prototypes @ anchors[i] / prototypes.norm(dim=1) / anchors[i].norm()
        alphas.append(torch.log(eps + torch.exp((cosines - own[i]) / tau).mean()))
    return torch.stack(alphas)


def objective(g: tuple[Tensor, Tensor], alpha: tuple[Tensor, Tensor], tau: Tensor, eps: float, rho: float) -> Tensor:
    """F above."""
    terms = [tau * (torch.exp(-a) * (eps + values) + a - 1.0) for values, a in zip(g, alpha)]
    return 0.5 * (terms[0] + terms[1]).mean() + tau * rho


@dataclass
class Step:
    """What one step of the reference yields."""

    loss: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]
    alpha: tuple[Tensor, Tensor]
    g: tuple[Tensor, Tensor]
    tau: Tensor


@dataclass
class ReferenceNeuCLIP:
    """Algorithm 1, with γ mixing.

    Attributes:
        num_prototypes, repetitions, restart_every: m, T_u, T_r.
        gamma: γ by (epoch, step).
        optimizer: "adagrad_norm", or "adagrad" for torch.optim.Adagrad.
    """

    num_prototypes: int
    repetitions: int
    restart_every: int
    eps: float
    rho: float
    lr: float
    gamma: Callable[[int, int], float]
    optimizer: str
    weight_decay: float = 0.0
    step_count: int = 0
    prototypes: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    adagrad: torch.optim.Adagrad | None = None

    def step(self, images: Tensor, texts: Tensor, logit_scale: Tensor, epoch: int) -> Step:
        """One batch: restart if due, T_u updates of W1 and W2, then loss and gradients at the α they give."""
        self.seen.insert(0, (images.detach(), texts.detach()))
        full = bool(self.prototypes) and len(self.prototypes[0]) == self.num_prototypes
        if not full or (self.restart_every > 0 and self.step_count % self.restart_every == 0):
            self.restart()

        fixed_images, fixed_texts = images.detach(), texts.detach()
        fixed_tau = 1.0 / logit_scale.detach()
        fixed_g = batch_g(fixed_images, fixed_texts, fixed_tau)
        for _ in range(self.repetitions):
            alpha = self.predict(fixed_images, fixed_texts, fixed_tau)
            value = objective(fixed_g, alpha, fixed_tau, self.eps, self.rho)
            self.update(torch.autograd.grad(value, self.prototypes))
        with torch.no_grad():
            alpha = self.predict(fixed_images, fixed_texts, fixed_tau)
            gamma = self.gamma(epoch, self.step_count)
            mixed = [torch.log((1 - gamma) * a.exp() + gamma * (self.eps + g)) for a, g in zip(alpha, fixed_g)]

        tau = 1.0 / logit_scale
        loss = objective(batch_g(images, texts, tau), (mixed[0], mixed[1]), tau, self.eps, self.rho)
        gradients = torch.autograd.grad(loss, (images, texts, logit_scale))
        self.step_count += 1
        return Step(loss.detach(), gradients, alpha, fixed_g, fixed_tau)

    def restart(self) -> None:
        """W1 ← texts, W2 ← images of the newest samples; the optimizer starts anew."""
        texts = torch.cat([pair[1] for pair in self.seen])[: self.num_prototypes]
        images = torch.cat([pair[0] for pair in self.seen])[: self.num_prototypes]
        self.prototypes = [texts.clone().requires_grad_(), images.clone().requires_grad_()]
        self.squares = [torch.zeros((), dtype=texts.dtype) for _ in range(2)]
        self.adagrad = torch.optim.Adagrad(self.prototypes, lr=self.lr, weight_decay=self.weight_decay)

    def predict(self, images: Tensor, texts: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.stack([image @ text for image, text in zip(images, texts)])
        return (
            predicted(images, own, self.prototypes[0], tau, self.eps),
            predicted(texts, own, self.prototypes[1], tau, self.eps),
        )

    def update(self, gradients: tuple[Tensor, ...]) -> None:
        if self.optimizer == "adagrad":
            assert self.adagrad is not None
            for prototypes, gradient in zip(self.prototypes, gradients):
                prototypes.grad = gradient
            self.adagrad.step()
            return
        for k, gradient in enumerate(gradients):
            self.squares[k] = self.squares[k] + (gradient**2).sum()
            moved = self.prototypes[k].detach() - self.lr * gradient / self.squares[k].sqrt()
            rows = [row / row.norm() for row in moved]
            self.prototypes[k] = torch.stack(rows).requires_grad_()

    @property
    def accumulators(self) -> list[Tensor]:
        """Sums of squared gradients, for W1 and W2."""
        if self.optimizer == "adagrad":
            assert self.adagrad is not None
            return [self.adagrad.state[prototypes]["sum"] for prototypes in self.prototypes]
        return self.squares
