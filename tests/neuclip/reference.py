"""NeuCLIP written down from its formulas: loops over anchors, plain autograd, float64, no log domain, one process.

Nothing here comes from the package under test. With e1_i, e2_i the image and text features of sample i, s_ij = e1_i·e2_j:

    g1_i = 1/(N−1) Σ_{j≠i} exp((s_ij − s_ii)/τ)                     g2_i = 1/(N−1) Σ_{j≠i} exp((s_ji − s_ii)/τ)
    α1_i = log(ε + 1/m Σ_j exp((cos(e1_i, W1_j) − s_ii)/τ))         α2_i = log(ε + 1/m Σ_j exp((cos(e2_i, W2_j) − s_ii)/τ))
    or, with an MLP per modality, α1_i = log(ε + exp(λ1(e1_i) − s_ii/τ)),  α2_i = log(ε + exp(λ2(e2_i) − s_ii/τ))
    F = ½·mean_i τ·[ exp(−α1_i)·(ε+g1_i) + α1_i − 1 + exp(−α2_i)·(ε+g2_i) + α2_i − 1 ] + τ·ρ
    log_l2 = mean_i (α1_i − log(ε+g1_i))² + mean_i (α2_i − log(ε+g2_i))²
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

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


def inner_objective(
    kind: str, g: tuple[Tensor, Tensor], alpha: tuple[Tensor, Tensor], tau: Tensor, eps: float
) -> Tensor:
    """What the NPN is trained on: the terms of F with α in them, or log_l2."""
    if kind == "unified":
        return sum(0.5 * tau * (torch.exp(-a) * (eps + values) + a).mean() for values, a in zip(g, alpha))
    return sum(((a - torch.log(eps + values)) ** 2).mean() for values, a in zip(g, alpha))


class Network(Protocol):
    """An NPN. `weights` holds a list of leaf tensors for each modality; they stay the same tensors forever."""

    weights: list[list[Tensor]]

    def restart(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Begin anew; `seen` are the batches so far, newest first, as (images, texts)."""

    @property
    def incomplete(self) -> bool:
        """Whether the last restart lacked samples."""

    def predict(self, images: Tensor, texts: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """α1 and α2, [N] each."""

    def after_a_step(self) -> None:
        """Put the weights back where they have to be after a step of adagrad_norm."""


class Prototypes:
    """W1 and W2, of which the first `active` rows are in use."""

    def __init__(self, count: int, dim: int, eps: float) -> None:
        self.weights = [[torch.zeros(count, dim, dtype=torch.float64, requires_grad=True)] for _ in range(2)]
        self.active = 0
        self.eps = eps

    @property
    def incomplete(self) -> bool:
        return self.active < len(self.weights[0][0])

    @torch.no_grad()
    def restart(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        count = len(self.weights[0][0])
        for k, of in enumerate((1, 0)):
            rows = torch.cat([pair[of] for pair in seen])[:count]
            self.active = len(rows)
            self.weights[k][0][: self.active] = rows

    def predict(self, images: Tensor, texts: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.stack([image @ text for image, text in zip(images, texts)])
        return (
            predicted(images, own, self.weights[0][0][: self.active], tau, self.eps),
            predicted(texts, own, self.weights[1][0][: self.active], tau, self.eps),
        )

    @torch.no_grad()
    def after_a_step(self) -> None:
        for (matrix,) in self.weights:
            for j in range(self.active):
                matrix[j] /= matrix[j].norm()


class MLPs:
    """λ1 and λ2.

    Args:
        initial: the weights of both modalities at the k-th restart, as a list for each.
        outputs: λ1 and λ2 of the given features from such weights, [N] each.
    """

    incomplete = False

    def __init__(
        self,
        initial: Callable[[int], list[list[Tensor]]],
        outputs: Callable[[list[list[Tensor]], Tensor, Tensor], tuple[Tensor, Tensor]],
        eps: float,
    ) -> None:
        self.initial = initial
        self.outputs = outputs
        self.eps = eps
        self.restarts = 0
        self.weights = [[tensor.clone().requires_grad_() for tensor in modality] for modality in initial(0)]

    @torch.no_grad()
    def restart(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        for modality, fresh in zip(self.weights, self.initial(self.restarts)):
            for tensor, start in zip(modality, fresh):
                tensor.copy_(start)
        self.restarts += 1

    def predict(self, images: Tensor, texts: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        alphas = []
        for outputs in self.outputs(self.weights, images, texts):
            own = [image @ text for image, text in zip(images, texts)]
            alphas.append(torch.stack([torch.log(self.eps + torch.exp(x - s / tau)) for x, s in zip(outputs, own)]))
        return alphas[0], alphas[1]

    def after_a_step(self) -> None:
        pass


class AdaGrad:
    """torch.optim.Adagrad on the weights of a network."""

    def __init__(self, network: Network, lr: float, weight_decay: float) -> None:
        self.network, self.lr, self.weight_decay = network, lr, weight_decay
        self.reset()

    def reset(self) -> None:
        leaves = [tensor for modality in self.network.weights for tensor in modality]
        self.optimizer = torch.optim.Adagrad(leaves, lr=self.lr, weight_decay=self.weight_decay)

    def step(self, gradients: list[list[Tensor]]) -> None:
        for modality, found in zip(self.network.weights, gradients):
            for tensor, gradient in zip(modality, found):
                tensor.grad = gradient
        self.optimizer.step()

    @property
    def accumulators(self) -> list[Tensor]:
        """Sums of squared gradients of each modality, flattened."""
        return [
            torch.cat([self.optimizer.state[tensor]["sum"].flatten() for tensor in modality])
            for modality in self.network.weights
        ]


class AdaGradNorm:
    """W ← W − lr·G / sqrt(Σ ‖G‖²), all weights of a modality together."""

    def __init__(self, network: Network, lr: float, weight_decay: float) -> None:
        self.network, self.lr, self.weight_decay = network, lr, weight_decay
        self.reset()

    def reset(self) -> None:
        self.accumulators = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]

    @torch.no_grad()
    def step(self, gradients: list[list[Tensor]]) -> None:
        for k, (modality, found) in enumerate(zip(self.network.weights, gradients)):
            decayed = [gradient + self.weight_decay * tensor for tensor, gradient in zip(modality, found)]
            self.accumulators[k] = self.accumulators[k] + sum((gradient**2).sum() for gradient in decayed)
            for tensor, gradient in zip(modality, decayed):
                tensor -= self.lr * gradient / self.accumulators[k].sqrt()
        self.network.after_a_step()


OPTIMIZERS = {"adagrad": AdaGrad, "adagrad_norm": AdaGradNorm}


@dataclass
class Step:
    """What one step of the reference yields.

    Attributes:
        inner_losses: the inner objective before and after each update of the inner loop; one value without such a loop.
        network_gradients: without an inner loop, the inner objective's gradient by the weights of each modality.
    """

    loss: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]
    alpha: tuple[Tensor, Tensor]
    g: tuple[Tensor, Tensor]
    tau: Tensor
    inner_losses: list[Tensor]
    network_gradients: list[list[Tensor]]


@dataclass
class ReferenceNeuCLIP:
    """Algorithm 1, with γ mixing; without an inner optimizer, NPN and encoders are to be stepped together by the caller.

    Attributes:
        repetitions, restart_every: T_u, T_r.
        gamma: γ by (epoch, step).
        inner: "unified" or "separate".
    """

    network: Network
    optimizer: AdaGrad | AdaGradNorm | None
    inner: str
    repetitions: int
    restart_every: int
    eps: float
    rho: float
    gamma: Callable[[int, int], float]
    step_count: int = 0
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def step(self, images: Tensor, texts: Tensor, logit_scale: Tensor, epoch: int) -> Step:
        """One batch: restart if due, train the NPN if it is trained here, then loss and gradients at the α it gives."""
        self.seen.insert(0, (images.detach(), texts.detach()))
        due = self.restart_every > 0 and self.step_count % self.restart_every == 0
        if due or self.step_count == 0 or self.network.incomplete:
            self.network.restart(self.seen)
            if self.optimizer is not None:
                self.optimizer.reset()

        fixed_images, fixed_texts = images.detach(), texts.detach()
        fixed_tau = 1.0 / logit_scale.detach()
        fixed_g = batch_g(fixed_images, fixed_texts, fixed_tau)
        losses = []
        for update in range(self.repetitions + 1):
            alpha = self.network.predict(fixed_images, fixed_texts, fixed_tau)
            value = inner_objective(self.inner, fixed_g, alpha, fixed_tau, self.eps)
            losses.append(value.detach())
            gradients = self._by_weights(value)
            if update < self.repetitions:
                assert self.optimizer is not None
                self.optimizer.step(gradients)
        alpha = (alpha[0].detach(), alpha[1].detach())
        gamma = self.gamma(epoch, self.step_count)
        mixed = [torch.log((1 - gamma) * a.exp() + gamma * (self.eps + g)) for a, g in zip(alpha, fixed_g)]

        tau = 1.0 / logit_scale
        loss = objective(batch_g(images, texts, tau), (mixed[0], mixed[1]), tau, self.eps, self.rho)
        found = torch.autograd.grad(loss, (images, texts, logit_scale))
        self.step_count += 1
        return Step(loss.detach(), found, alpha, fixed_g, fixed_tau, losses, gradients)

    def _by_weights(self, value: Tensor) -> list[list[Tensor]]:
        leaves = [tensor for modality in self.network.weights for tensor in modality]
        flat = torch.autograd.grad(value, leaves)
        half = len(flat) // 2
        return [list(flat[:half]), list(flat[half:])]
