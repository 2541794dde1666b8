"""AmorLIP's one option that depends on the number of ranks: the normalizer from a rank's own samples, K times over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip import RunShape, make_objective
from neuclip.objectives.amorlip import AmorLIP
from ranks import run_on_ranks

from .programs import world

N, DIM, SCALE, POSITIVE_WEIGHT = 8, 6, 4.0, 0.5


def global_features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images, texts = F.normalize(torch.randn(2, N, DIM, generator=generator, dtype=torch.float64), dim=2)
    return images, texts


def step(flags: str) -> dict[str, Any]:
    """One step of this rank on its share: loss, gradients of its features, and state."""
    rank, world_size = world()
    share = N // world_size
    own = slice(rank * share, (rank + 1) * share)
    images, texts = (x[own].clone().requires_grad_() for x in global_features())
    objective = make_objective(flags, RunShape(DIM, share, world_size, 2, 2)).double()
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    loss = objective(images, texts, scale).loss
    gradients = torch.autograd.grad(loss, (images, texts, scale))
    return {"loss": loss.detach(), "gradients": gradients, "state": objective.state_dict()}


def log_sums(logits: Tensor, ranks: int) -> Tensor:
    """log(K·Σ over the other samples of the same rank + pos_coef·exp(x_ii)), by loops."""
    share = N // ranks
    values = []
    for i in range(N):
        same_rank = [j for j in range(N) if j != i and j // share == i // share]
        total = ranks * sum(float(logits[i, j].exp()) for j in same_rank)
        values.append(total + POSITIVE_WEIGHT * float(logits[i, i].exp()))
    return torch.tensor(values, dtype=torch.float64).log()


def expected_loss(images: Tensor, texts: Tensor, scale: Tensor, ranks: int) -> Tensor:
    """The loss of the whole batch, at those normalizers."""
    logits = scale * images @ texts.T
    normalizers = [log_sums(block, ranks) for block in (logits.detach(), logits.detach().T)]
    factors = torch.ones(N, N, dtype=torch.float64).fill_diagonal_(POSITIVE_WEIGHT)
    total = -2 * logits.diag().mean()
    for block, normalizer in zip((logits, logits.T), normalizers):
        total = total + (factors * block.exp() / normalizer.exp()[:, None]).sum() / N
    return total


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_sum_of_a_rank_stands_for_all(ranks: int) -> None:
    flags = f"--objective amorlip --no-calculate_full --no-scale_loss --pos_coef {POSITIVE_WEIGHT}"
    results = run_on_ranks(step, ranks, flags)
    images, texts = (x.requires_grad_() for x in global_features())
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    expected = expected_loss(images, texts, scale, ranks)
    by_images, by_texts, by_scale = torch.autograd.grad(expected, (images, texts, scale))
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(torch.stack([result["loss"] for result in results]).mean(), expected.detach(), **close)
    for k, whole in ((0, by_images), (1, by_texts)):
        # Averaging over the ranks divides by their number.
        torch.testing.assert_close(torch.cat([result["gradients"][k] for result in results]) / ranks, whole, **close)
    scales = torch.stack([result["gradients"][2] for result in results])
    torch.testing.assert_close(scales.mean(), by_scale, **close)
    weights = [result["state"]["normalizer.current.weights"] for result in results]
    assert all(torch.equal(other, weights[0]) for other in weights)
    fresh = make_objective(flags, RunShape(DIM, N // ranks, ranks, 2, 2))
    assert isinstance(fresh, AmorLIP)
    assert not torch.equal(weights[0], fresh.normalizer.current.weights.double())
