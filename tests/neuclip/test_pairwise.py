"""Closed-form gradients against autograd of the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip import make_objective, pairwise
from neuclip.normalizers import INNER_OBJECTIVES, PrototypeNormalizer
from neuclip.objectives import RunShape
from neuclip.pairwise import GlobalBatch, batch_log_means, gather_batch, pairwise_gradient, with_gradients

from .conftest import FeatureMaker
from .reference import batch_g, inner_objective, predicted

SCALE = torch.tensor(9.0, dtype=torch.float64)
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def as_rank(images: Tensor, texts: Tensor, rank: int, world_size: int) -> GlobalBatch:
    """The batch as one of several ranks would see it after gathering."""
    local_size = images.shape[0] // world_size
    return GlobalBatch(
        features=torch.stack((images, texts)).detach(),
        positive=(images * texts).sum(dim=1).detach(),
        start=rank * local_size,
        local_size=local_size,
    )


def weighted_loss(images: Tensor, texts: Tensor, log_normalizers: Tensor, tau: Tensor) -> Tensor:
    """½·mean_i τ·[exp(−α1_i)·g1_i + exp(−α2_i)·g2_i]."""
    g = torch.stack(batch_g(images, texts, tau))
    return 0.5 * (tau * torch.exp(-log_normalizers) * g).sum(dim=0).mean()


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2), (0, 4), (2, 4), (3, 4)])
def test_gradient_equals_autograd_on_every_rank(rank: int, world_size: int, features: FeatureMaker) -> None:
    images, texts = features(1, 8)
    # Far from the batch's own normalizers: nothing may rely on α being optimal.
    alpha = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 3
    batch = as_rank(images, texts, rank, world_size)
    result = pairwise_gradient(batch, alpha, SCALE)
    whole = torch.autograd.grad(weighted_loss(images, texts, alpha, 1 / SCALE), (images, texts))
    torch.testing.assert_close(result.features, world_size * torch.stack(whole)[:, batch.local], **EXACT)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (3, 4)])
def test_sums_over_the_negatives(rank: int, world_size: int, features: FeatureMaker) -> None:
    images, texts = features(1, 8)
    alpha = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 3
    batch = as_rank(images, texts, rank, world_size)
    result = pairwise_gradient(batch, alpha, SCALE)
    g = torch.stack(batch_g(images, texts, 1 / SCALE)).detach()
    torch.testing.assert_close(result.ratio, (g * torch.exp(-alpha))[:, batch.local], **EXACT)
    # Σ w·h is a derivative by the temperature: τ·dg/dτ = −mean_j exp(h)·h.
    for modality in range(2):
        for local, i in enumerate(range(batch.start, batch.start + batch.local_size)):
            tau = (1 / SCALE).requires_grad_()
            (slope,) = torch.autograd.grad(batch_g(images.detach(), texts.detach(), tau)[modality][i], tau)
            expected = -slope * tau.detach() * torch.exp(-alpha[modality, i])
            torch.testing.assert_close(result.weighted_logits[modality, local], expected, **EXACT)


def test_log_means_equal_the_plain_means(features: FeatureMaker) -> None:
    images, texts = features(3, 8)
    expected = torch.stack(batch_g(images, texts, 1 / SCALE)).log().detach()
    torch.testing.assert_close(batch_log_means(as_rank(images, texts, 0, 1), SCALE), expected, **EXACT)
    torch.testing.assert_close(batch_log_means(as_rank(images, texts, 1, 4), SCALE), expected[:, 2:4], **EXACT)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_chunks_of_rows_equal_the_dense_block(
    rows: int, rank: int, world_size: int, features: FeatureMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, texts = features(4, 14)
    alpha = torch.randn(2, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) - 2
    batch = as_rank(images, texts, rank, world_size)
    assert len(list(batch.row_chunks())) == 1
    dense_means, dense = batch_log_means(batch, SCALE), pairwise_gradient(batch, alpha, SCALE)

    monkeypatch.setattr(pairwise, "MAX_BLOCK_ELEMENTS", 14 * rows + 13)
    chunks = list(batch.row_chunks())
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(batch.local_size))
    assert max(chunk.stop - chunk.start for chunk in chunks) == rows
    torch.testing.assert_close(batch_log_means(batch, SCALE), dense_means, **EXACT)
    chunked = pairwise_gradient(batch, alpha, SCALE)
    torch.testing.assert_close(chunked.features, dense.features, **EXACT)
    torch.testing.assert_close(chunked.ratio, dense.ratio, **EXACT)
    torch.testing.assert_close(chunked.weighted_logits, dense.weighted_logits, **EXACT)


def test_a_block_wider_than_the_budget_is_cut_into_single_rows(
    features: FeatureMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairwise, "MAX_BLOCK_ELEMENTS", 3)
    assert len(list(as_rank(*features(4, 14), 0, 2).row_chunks())) == 7


def test_one_sample_has_no_negatives(features: FeatureMaker) -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        gather_batch(*features(0, 1))


@pytest.mark.parametrize("inner", sorted(INNER_OBJECTIVES))
@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.3])
@pytest.mark.parametrize("m", [1, 5, 8])
def test_prototype_gradient_equals_autograd_at_any_row_length(
    m: int, eps: float, inner: str, features: FeatureMaker
) -> None:
    images, texts = features(6, 8)
    normalizer = PrototypeNormalizer(m, 6, eps, INNER_OBJECTIVES[inner](), None, batch_size=8).double()
    batch = gather_batch(images, texts)
    normalizer.restart(batch)
    generator = torch.Generator().manual_seed(7)
    prototypes = normalizer.prototypes.detach()
    # Somewhere else than at a restart, with rows between half and twice unit length.
    moved = F.normalize(prototypes + 0.3 * torch.randn(2, m, 6, generator=generator).double(), dim=2)
    prototypes.copy_(moved * (0.5 + 1.5 * torch.rand(2, m, 1, generator=generator).double()))

    g1, g2 = (values.detach() for values in batch_g(images, texts, 1 / SCALE))
    targets = torch.log(eps + torch.stack((g1, g2)))
    found_alpha, parameters, (gradient,) = normalizer.differentiate(batch, targets, SCALE)
    assert len(parameters) == 1
    assert parameters[0] is normalizer.prototypes
    w = prototypes.clone().requires_grad_()
    fixed = [x.detach() for x in (images, texts)]
    alpha = [predicted(anchors, batch.positive, w[k], 1 / SCALE, eps) for k, anchors in enumerate(fixed)]
    torch.testing.assert_close(found_alpha, torch.stack(alpha).detach(), **EXACT)
    torch.testing.assert_close(normalizer.predict(batch, SCALE), torch.stack(alpha).detach(), **EXACT)
    value = inner_objective(inner, (g1, g2), (alpha[0], alpha[1]), 1 / SCALE, eps)
    (expected,) = torch.autograd.grad(value, w)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected, **EXACT)
    # Tangent: no part along the row.
    assert F.cosine_similarity(gradient, prototypes, dim=2).abs().max() < 1e-12


def test_gradients_worked_out_beforehand_follow_the_chain_rule() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = torch.tensor(3.0, requires_grad=True)
    value = with_gradients(torch.tensor(5.0), (2 * x, y), (torch.tensor([10.0, 20.0]), torch.tensor(30.0)))
    assert value.tolist() == 5.0
    (7 * value).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.tolist() == [140.0, 280.0]
    assert float(y.grad) == 210.0


def test_gradients_of_another_shape_are_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        with_gradients(torch.tensor(5.0), (x,), (torch.ones(3),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_arrive_in_the_type_of_the_features(dtype: torch.dtype, features: FeatureMaker) -> None:
    images, texts = features(8, 4, dtype=dtype)
    objective = make_objective("--objective neuclip --npn_num_protos 4", RunShape(6, 4, 1, 10, 1))
    output = objective(images, texts, torch.tensor(10.0))
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert images.grad is not None
    assert images.grad.dtype == dtype
