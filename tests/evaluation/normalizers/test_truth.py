"""Streamed normalizers against plain loops in float64, on 1, 2 and 4 ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from evaluation.normalizers.truth import Anchors, StreamedNormalizers
from ranks import run_on_ranks


def features(number: int, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    pairs = torch.randn(2, number, dim, generator=generator)
    return F.normalize(pairs[0], dim=1), F.normalize(pairs[0] + 0.5 * pairs[1], dim=1)


def plain(images: Tensor, texts: Tensor, scales: Tensor, anchors: list[int], eps: float) -> Tensor:
    """By the definition, one term at a time."""
    result = torch.empty(2, len(anchors), dtype=torch.float64)
    for side, (own, other) in enumerate(((images.double(), texts.double()), (texts.double(), images.double()))):
        for place, i in enumerate(anchors):
            terms = [
                math.exp(float((own[i] @ other[j] - own[i] @ other[i]) * scales[side, place].double()))
                for j in range(len(images))
                if j != i
            ]
            result[side, place] = math.log(eps + sum(terms) / len(terms))
    return result


def streamed(payload: dict[str, Any]) -> dict[str, Any]:
    """The normalizers of some anchors, candidates passing by in uneven batches."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images, texts = features(payload["number"])
    chosen = torch.tensor(payload["anchors"])
    sums = StreamedNormalizers(Anchors(images[chosen], texts[chosen], chosen, payload["scales"]), block=3)
    own = torch.arange(payload["number"])[rank::world_size] if rank < payload["with_data"] else torch.arange(0)
    if payload["with_data"] < world_size and rank < payload["with_data"]:
        own = torch.arange(payload["number"])
    for rows in own.split(7) if len(own) else ():
        sums.add(images[rows], texts[rows], rows)
    alpha, total = sums.log_normalizers(payload["log_eps"], world_size)
    return {"alpha": alpha, "total": total}


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_definition(eps: float) -> None:
    number, anchors = 23, [0, 5, 6, 22]
    scales = torch.tensor([[10.0, 20.0, 5.0, 14.0], [9.0, 30.0, 2.0, 14.0]])
    log_eps = math.log(eps) if eps else -math.inf
    found = streamed({"number": number, "anchors": anchors, "scales": scales, "log_eps": log_eps, "with_data": 9})
    assert found["total"] == number
    torch.testing.assert_close(found["alpha"], plain(*features(number), scales, anchors, eps), rtol=0, atol=2e-5)


def test_small_temperatures_do_not_overflow() -> None:
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the wrong way round: h reaches 200
    scales = torch.full((2, 3), 100.0)
    sums = StreamedNormalizers(Anchors(images, texts, torch.arange(3), scales))
    sums.add(images, texts, torch.arange(3))
    alpha, _ = sums.log_normalizers(-math.inf)
    assert float(alpha[0, 0]) == pytest.approx(200 - math.log(2), abs=1e-3)
    assert bool(torch.isfinite(alpha).all())


@pytest.mark.parametrize(("world_size", "with_data"), [(2, 2), (4, 4), (2, 1)])
def test_ranks(world_size: int, with_data: int) -> None:
    scales = torch.full((2, 4), 14.0)
    payload = {"number": 23, "anchors": [1, 2, 17, 20], "scales": scales, "log_eps": -20.0, "with_data": 9}
    alone = streamed(payload)
    for found in run_on_ranks(streamed, world_size, {**payload, "with_data": with_data}):
        assert found["total"] == 23
        torch.testing.assert_close(found["alpha"], alone["alpha"], rtol=0, atol=1e-6)


def test_one_sample_has_no_negative() -> None:
    images, texts = features(3)
    sums = StreamedNormalizers(Anchors(images[:1], texts[:1], torch.tensor([0]), torch.ones(2, 1)))
    sums.add(images[:1], texts[:1], torch.tensor([0]))
    with pytest.raises(ValueError, match="at least two"):
        sums.log_normalizers(-math.inf)
