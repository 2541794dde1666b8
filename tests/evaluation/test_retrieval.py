"""Retrieval metrics against a reference that sorts nothing and blocks nothing, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.retrieval import chance_metrics, chance_recall, grouped_retrieval_metrics, retrieval_metrics

WAYS = ("image_to_text", "text_to_image")


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Random unit vectors."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def reference(image: np.ndarray, text: np.ndarray, image_ids: np.ndarray, text_ids: np.ndarray) -> dict[str, float]:
    """Expected recall and rank under random tie breaking, anchor by anchor, from the hypergeometric law."""
    metrics = {}
    scores = image.astype(np.float64) @ text.astype(np.float64).T
    for way, matrix, rows, columns in (
        ("image_to_text", scores, image_ids, text_ids),
        ("text_to_image", scores.T, text_ids, image_ids),
    ):
        ranks, hits = [], {1: [], 5: [], 10: []}
        for anchor, line in zip(rows, matrix):
            right = columns == anchor
            best = line[right].max()
            higher = int(((line - best > 1e-6) & ~right).sum())
            wrong = int(((abs(line - best) <= 1e-6) & ~right).sum())
            tied = int(((abs(line - best) <= 1e-6) & right).sum())
            ranks.append(higher + (wrong + tied + 1) / (tied + 1))
            for k, values in hits.items():
                places = min(max(k - higher, 0), wrong + tied)
                values.append(1 - math.comb(wrong, places) / math.comb(wrong + tied, places))
        metrics |= {f"{way}_mean_rank": np.mean(ranks), f"{way}_median_rank": np.median(ranks)}
        metrics |= {f"{way}_R@{k}": np.mean(values) for k, values in hits.items()}
    return metrics


def assert_same(got: dict[str, float], wanted: dict[str, float]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(("number", "block"), [(1, 4), (7, 3), (50, 16), (61, 7), (64, 1024)])
def test_agrees_with_brute_force(number: int, block: int) -> None:
    image, text = unit(number, 8, seed=1), unit(number, 8, seed=2)
    ids = np.arange(number)
    wanted = reference(image.numpy(), text.numpy(), ids, ids)
    assert_same(retrieval_metrics(image, text, block=block), wanted)


def test_agrees_with_open_clips_definition() -> None:
    image = unit(41, 6, seed=1)
    text = F.normalize(image + 0.8 * unit(41, 6, seed=2), dim=-1)
    order = (image @ text.T).argsort(descending=True)
    places = torch.where(order == torch.arange(41)[:, None])[1].numpy()
    got = retrieval_metrics(image, text)
    assert got["image_to_text_mean_rank"] == pytest.approx(places.mean() + 1)
    assert got["image_to_text_median_rank"] == np.floor(np.median(places)) + 1
    assert 0.1 < got["image_to_text_R@1"] < 0.9
    for k in (1, 5, 10):
        assert got[f"image_to_text_R@{k}"] == pytest.approx(np.mean(places < k))


def test_partial_ties_agree_with_brute_force() -> None:
    # Few distinct vectors: every anchor has several candidates at exactly its own score.
    image, text = unit(5, 8, seed=1)[torch.arange(53) % 5], unit(3, 8, seed=2)[torch.arange(53) % 3]
    ids = np.arange(53)
    got = retrieval_metrics(image, text, block=8)
    assert_same(got, reference(image.numpy(), text.numpy(), ids, ids))
    assert 0 < got["image_to_text_R@1"] < 1 / 8


@pytest.mark.parametrize("number", [23, 100])
def test_a_collapsed_model_scores_chance(number: int) -> None:
    image, text = unit(1, 512, seed=1).expand(number, -1), unit(1, 512, seed=2).expand(number, -1)
    got = retrieval_metrics(image, text, block=16)
    for way in WAYS:
        for k in (1, 5, 10):
            assert got[f"{way}_R@{k}"] == pytest.approx(k / number, abs=1e-12)
        assert got[f"{way}_mean_rank"] == got[f"{way}_median_rank"] == (number + 1) / 2
    assert_same(got, {name: value for name, value in chance_metrics(number).items() if value is not None})


def test_a_perfect_model_scores_one() -> None:
    got = retrieval_metrics(torch.eye(12), torch.eye(12), block=5)
    assert got["image_to_text_R@1"] == got["text_to_image_R@1"] == 1
    assert got["image_to_text_mean_rank"] == got["text_to_image_median_rank"] == 1


def test_the_two_directions_are_not_mixed_up() -> None:
    # Both texts lie at the first image: each text finds image 0, images find their text by a coin toss and not at all.
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    got = retrieval_metrics(image, text)
    assert got["text_to_image_R@1"] == 0.5
    assert got["image_to_text_R@1"] == 1.0


def test_equal_captions_count_as_right() -> None:
    image, text = unit(40, 8, seed=1), unit(40, 8, seed=2)
    ids = torch.arange(40) % 9
    text = text[ids]  # equal captions have equal features
    got = retrieval_metrics(image, text, caption_ids=ids, block=7)
    assert_same(got, reference(image.numpy(), text.numpy(), ids.numpy(), ids.numpy()))
    strict = retrieval_metrics(image, text, block=7)
    assert got["image_to_text_R@5"] > strict["image_to_text_R@5"]
    # The partner is found, but only by a coin toss among its equals, when they do not count.
    exact = retrieval_metrics(text, text, block=7)
    assert exact["image_to_text_R@1"] == pytest.approx(9 / 40)
    assert retrieval_metrics(text, text, caption_ids=ids)["image_to_text_R@1"] == 1


def test_several_captions_per_image() -> None:
    image, text = unit(11, 8, seed=1), unit(29, 8, seed=2)
    text_ids = torch.cat([torch.arange(11), torch.arange(18) % 7])
    got = grouped_retrieval_metrics(image, text, torch.arange(11), text_ids, block=4)
    assert_same(got, reference(image.numpy(), text.numpy(), np.arange(11), text_ids.numpy()))


def test_chance_is_what_random_features_score() -> None:
    ids = torch.arange(60) % 13
    totals: dict[str, float] = {}
    for seed in range(60):
        got = retrieval_metrics(unit(60, 16, seed=2 * seed), unit(60, 16, seed=2 * seed + 1), caption_ids=ids)
        for name, value in got.items():
            totals[name] = totals.get(name, 0) + value / 60
    for name, value in chance_metrics(60, ids).items():
        if value is None:
            assert name.endswith("median_rank")
        else:
            assert totals[name] == pytest.approx(value, rel=0.1), name


def test_chance_recall() -> None:
    assert chance_recall(200, 5) == pytest.approx(5 / 200)
    assert chance_recall(4, 10) == 1
    assert chance_recall(10, 2, relevant=3) == pytest.approx(1 - (7 / 10) * (6 / 9))
    with pytest.raises(ValueError, match="relevant=11"):
        chance_recall(10, 2, relevant=11)


def test_tf32_and_autocast_do_not_reach_the_scores() -> None:
    image, text = unit(40, 8, seed=1), unit(40, 8, seed=2)
    wanted = retrieval_metrics(image, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval_metrics(image, text) == wanted
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        retrieval_metrics(image, text)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # handed back as it was
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("image", "text", "ids", "message"),
    [
        (torch.full((3, 2), torch.nan), torch.ones(3, 2), None, "image_features .* not finite"),
        (torch.ones(3, 2), torch.full((3, 2), torch.inf), None, "text_features .* not finite"),
        (torch.ones(0, 2), torch.ones(0, 2), None, "at least one row"),
        (torch.ones(3, 2), torch.ones(3, 4), None, "widths must agree"),
        (torch.ones(3, 2), torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), "one id for each of the 3"),
    ],
)
def test_mistakes(image: Tensor, text: Tensor, ids: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(image, text, caption_ids=ids)


def test_an_image_without_a_caption_is_an_error() -> None:
    with pytest.raises(ValueError, match="no text of its id"):
        grouped_retrieval_metrics(torch.ones(3, 2), torch.ones(2, 2), torch.arange(3), torch.arange(2))
