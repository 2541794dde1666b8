"""Recall with several captions per image and the Jaccard index, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.datacomp.pairs import recall_metrics
from evaluation.datacomp.winogavil import jaccard_metrics, prompt


def features(number: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(number, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("images", "block"), [(23, 1000), (23, 5), (4, 3)])
def test_recall(images: int, block: int) -> None:
    owner = [image for image in range(images) for _ in range(1 + image % 4)]
    image_features, text_features = features(images, 0), features(len(owner), 1)
    got = recall_metrics(image_features, text_features, torch.tensor(owner), block=block)
    scores = (text_features.double() @ image_features.double().T).tolist()
    wanted = {}
    for k in (1, 5, 10):
        found = 0
        for text, image in enumerate(owner):
            found += image in sorted(range(images), key=lambda i, text=text: -scores[text][i])[:k]
        wanted[f"image_retrieval_recall@{k}"] = found / len(owner)
        found = 0
        for image in range(images):
            best = sorted(range(len(owner)), key=lambda j, image=image: -scores[j][image])[:k]
            found += image in [owner[j] for j in best]
        wanted[f"text_retrieval_recall@{k}"] = found / images
    wanted["mean_recall@1"] = 0.5 * (wanted["image_retrieval_recall@1"] + wanted["text_retrieval_recall@1"])
    assert got == pytest.approx(wanted, abs=1e-12)


def test_a_collapsed_model_is_not_rewarded() -> None:
    owner = torch.arange(40).repeat_interleave(2)
    got = recall_metrics(features(1, 0).expand(40, -1), features(1, 1).expand(80, -1), owner)
    assert got["mean_recall@1"] <= 0.05


def test_jaccard() -> None:
    generator = np.random.default_rng(0)
    images, texts = features(30, 2), features(21, 3)
    sizes = [(5, 6, 10, 12, 11, 7, 4)[i % 7] for i in range(21)]
    instances = [generator.choice(30, size, replace=False).tolist() for size in sizes]
    associated = [generator.permutation([True, True] + [False] * (size - 2)) for size in sizes]
    scores = []
    for text, numbers, right in zip(texts, instances, associated):
        order = sorted(range(len(numbers)), key=lambda i: -float(images[numbers[i]] @ text))
        chosen, wanted = set(order[:2]), {i for i, is_right in enumerate(right) if is_right}
        scores.append(len(chosen & wanted) / len(chosen | wanted))
    wanted_metrics = {
        "avg_jaccard_score": sum(scores) / 21,
        **{f"jaccard_score_{n}": np.mean([s for s, size in zip(scores, sizes) if size == n]) for n in (5, 6, 10, 12)},
        "jaccard_score_5-6": np.mean([s for s, size in zip(scores, sizes) if size in (4, 5, 6)]),
        "jaccard_score_10-12": np.mean([s for s, size in zip(scores, sizes) if size in (10, 11, 12)]),
    }
    assert jaccard_metrics(images, texts, instances, associated) == pytest.approx(wanted_metrics, abs=1e-12)


def test_no_instance_of_a_size_is_none() -> None:
    got = jaccard_metrics(features(5, 0), features(1, 1), [[0, 1, 2, 3, 4]], [np.array([True] + [False] * 4)])
    assert got["jaccard_score_10-12"] is None
    assert got["jaccard_score_5-6"] == got["avg_jaccard_score"]


@pytest.mark.parametrize(("cue", "text"), [("Otter", "An otter"), ("BRIDGE", "A bridge"), ("hour", "A hour")])
def test_prompt(cue: str, text: str) -> None:
    assert prompt(cue) == text
