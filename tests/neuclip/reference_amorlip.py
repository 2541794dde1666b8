"""AmorLIP written down from its formulas: loops over pairs, plain autograd, torch.optim.Adam, float64, no log domain.

Nothing here comes from the package under test. With e1_i, e2_i the image and text features of sample i, x_ij = a·e1_i·e2_j + b
(a the logit scale, b the bias), c_ii = pos_coef and c_ij = 1 elsewhere:

    Z1_i = Σ_j c_ij·exp(x_ij)                                           Z2_i = Σ_j c_ij·exp(x_ji)
    T_i  = log(β·exp(previous(e_i)) + (1−β)·Z_i)                        β = z_beta_max·½(1 − cos(π·epoch/beta_decay_epochs))
    F    = −2·mean_i x_ii + mean_i Σ_j c_ij·exp(x_ij)/exp(λ̂1_i) + mean_i Σ_j c_ij·exp(x_ji)/exp(λ̂2_i)
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Linear, ReLU, LayerNorm, Linear, ReLU, LayerNorm, plus the input, ReLU, Linear to one number."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_1, self.norm_1 = nn.Linear(dim, hidden), nn.LayerNorm(hidden)
        self.linear_2, self.norm_2 = nn.Linear(hidden, dim), nn.LayerNorm(dim)
        self.linear_3 = nn.Linear(dim, 1)
        self.double()

    def forward(self, feature: Tensor) -> Tensor:
        hidden = self.norm_1(torch.relu(self.linear_1(feature)))
        hidden = self.norm_2(torch.relu(self.linear_2(hidden)))
        return self.linear_3(torch.relu(hidden + feature))[0]


@dataclass
class Options:
    """The published flags, without their dashes."""

    loss: str = "log_l2"
    updates: list[int] = field(default_factory=lambda: [3])
    lr: float = 1e-3
    rho_list: list[float] = field(default_factory=lambda: [8.5, -8.5, -8.5])
    model_ema_beta: float = 0.92
    beta_decay_epochs: float = 2.0
    z_beta_max: float = 0.8
    reinit_every: int = 1
    pos_coef: float = 1e-3
    h_dim_factor: float = 1.0
    fit_w_prev: bool = True
    scale_loss: bool = True
    adaptive_tau: bool = False
    eps: float = 0.0
    update_every: int = 1
    ema_every: int = 2
    neg_only: bool = False
    div_reg_coef: float = 0.1
    ranks: int = 1  # more than 1: negatives' sums over a rank's own samples, times the number of ranks
    epochs: int = 3


def sum_over_negatives(logits: Tensor, i: int, ranks: int) -> Tensor:
    """Σ_{j≠i} exp(x_ij), or with several ranks K times the part of it that lies on the rank of i."""
    size = logits.shape[0]
    share = size // ranks
    on_rank = range(i // share * share, (i // share + 1) * share)
    return ranks * sum((torch.exp(logits[i, j]) for j in on_rank if j != i), torch.zeros((), dtype=logits.dtype))


def generalised_kl(q: Tensor, p: Tensor) -> Tensor:
    """D(q‖p) of one pair's unnormalised weights."""
    return q * torch.log(q / p) - q + p


def divergence(kind: str, terms: list[Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """Between q_k = term_k/exp(prediction) and p_k = term_k/exp(target), k running over the pairs of one anchor."""
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        q, p = term / torch.exp(prediction), term / torch.exp(target)
        middle = (p + q) / 2
        total = (
            total
            + {
                "kl_div_asym": lambda q=q, p=p, m=middle: generalised_kl(q, p),
                "kl_div_sym": lambda q=q, p=p, m=middle: generalised_kl(q, p) + generalised_kl(p, q),
                "js_div": lambda q=q, p=p, m=middle: (generalised_kl(p, m) + generalised_kl(q, m)) / 2,
            }[kind]()
        )
    return total


def spread(values: list, epoch: int, epochs: int) -> float:  # type: ignore[type-arg]
    """Values in equal parts of the run, the last one for the rest."""
    schedule: list[float] = []
    for value in values[:-1]:
        schedule += [value] * (epochs // len(values))
    return (schedule + [values[-1]] * epochs)[epoch]


@dataclass
class AmorLIPStep:
    """What one step of the reference yields; all detached."""

    loss: Tensor
    gradients: tuple[Tensor, ...]
    inner_before: Tensor
    inner_after: Tensor
    log_normalizers: Tensor  # [2, N], λ̂
    z_beta: float
    rho: float


class ReferenceAmorLIP:
    """One process, whole batches. Whoever uses it sets the weights of `networks` at the beginning and after a re-start."""

    def __init__(self, dim: int, options: Options) -> None:
        self.options = options
        self.networks = [Network(dim, int(dim * options.h_dim_factor)) for _ in range(2)]
        self.step_count = 0
        self.begin()
        self.previous = copy.deepcopy(self.averages)

    def begin(self) -> None:
        """After `networks` got fresh weights: a fresh Adam, and averages equal to the networks."""
        parameters = [p for network in self.networks for p in network.parameters()]
        self.adam = torch.optim.Adam(parameters, lr=self.options.lr)
        self.averages = copy.deepcopy(self.networks)

    def keep_averages(self) -> None:
        """What a new epoch begins with."""
        self.previous = copy.deepcopy(self.averages)

    def step(self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None, epoch: int) -> AmorLIPStep:
        options, size = self.options, images.shape[0]
        fixed = self._logits(images.detach(), texts.detach(), scale.detach(), None if bias is None else bias.detach())
        anchors = (images.detach(), texts.detach())
        beta = options.z_beta_max
        if epoch < options.beta_decay_epochs:
            beta *= 0.5 * (1 - math.cos(math.pi * epoch / options.beta_decay_epochs))
        in_sum = 0.0 if options.neg_only else options.pos_coef

        sums, targets = [], []
        for logits, features, previous in zip((fixed, fixed.T), anchors, self.previous):
            z = [sum_over_negatives(logits, i, options.ranks) + in_sum * logits[i, i].exp() for i in range(size)]
            with torch.no_grad():
                former = [torch.exp(previous(feature)) for feature in features]
            sums.append(z)
            mixed = [beta * f + (1 - beta) * value for f, value in zip(former, z)] if options.fit_w_prev else z
            targets.append([torch.log(value) for value in mixed])

        before = self._inner_loss(fixed, anchors, sums, targets).detach()
        if self.step_count % options.update_every == 0:
            for _ in range(int(spread(options.updates, epoch, options.epochs))):
                self.adam.zero_grad()
                self._inner_loss(fixed, anchors, sums, targets).backward()
                self.adam.step()
        after = self._inner_loss(fixed, anchors, sums, targets).detach()

        with torch.no_grad():
            used = targets
            if not options.fit_w_prev:
                used = [[net(feature) for feature in features] for net, features in zip(self.averages, anchors)]
            z_hat = torch.stack([torch.stack(row) for row in used]).add(options.eps).exp()
            if options.neg_only:
                z_hat = z_hat + options.pos_coef * fixed.diag().exp()
            if self.step_count % options.ema_every == 0:
                for average, network in zip(self.averages, self.networks):
                    for a, p in zip(average.parameters(), network.parameters()):
                        a.copy_(options.model_ema_beta * a + (1 - options.model_ema_beta) * p)
        self.step_count += 1

        rho = spread(options.rho_list, epoch, options.epochs)
        loss = self._loss(self._logits(images, texts, scale, bias), z_hat, scale, rho)
        inputs = [x for x in (images, texts, scale, bias) if x is not None]
        gradients = torch.autograd.grad(loss, inputs)
        beta = beta if options.fit_w_prev else 0.0
        return AmorLIPStep(loss.detach(), gradients, before, after, z_hat.log(), beta, rho)

    def _loss(self, logits: Tensor, z_hat: Tensor, scale: Tensor, rho: float) -> Tensor:
        size, options = logits.shape[0], self.options
        total = torch.zeros((), dtype=torch.float64)
        for i in range(size):
            total = total - 2 * logits[i, i] / size
            for j in range(size):
                weight = options.pos_coef if i == j else 1.0
                total = total + weight * (logits[i, j].exp() / z_hat[0, i] + logits[j, i].exp() / z_hat[1, i]) / size
        if not options.scale_loss:
            return total
        total = total / scale.detach() + rho / scale
        if options.adaptive_tau:
            bracket = -2 * logits.diag().mean() + (z_hat.log().sum(dim=0) - 2 * math.log(size)).mean()
            total = total + bracket.detach() / scale
        return total

    def _inner_loss(
        self, logits: Tensor, anchors: tuple[Tensor, Tensor], sums: list[list[Tensor]], targets: list[list[Tensor]]
    ) -> Tensor:
        """The mean over the image anchors plus that over the text anchors."""
        options, size = self.options, logits.shape[0]
        share = size // options.ranks
        total = torch.zeros((), dtype=torch.float64)
        for modality, (block, features, network) in enumerate(zip((logits, logits.T), anchors, self.networks)):
            for i in range(size):
                prediction, target = network(features[i]), targets[modality][i]
                square = (prediction - target) ** 2
                if options.loss == "log_l2":
                    total = total + square / size
                    continue
                on_rank = range(i // share * share, (i // share + 1) * share)
                terms = [options.ranks * block[i, j].exp() for j in on_rank if j != i]
                if options.pos_coef > 0 and not options.neg_only:
                    terms.append(options.pos_coef * block[i, i].exp())
                torch.testing.assert_close(sum(terms), sums[modality][i], rtol=1e-12, atol=0.0)
                apart = divergence(options.loss, terms, prediction, target)
                total = total + (apart + options.div_reg_coef * square) / size
        return total

    @staticmethod
    def _logits(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        logits = scale * images @ texts.T
        return logits if bias is None else logits + bias
