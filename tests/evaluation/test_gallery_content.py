"""Searches and their ranks against a sorted list, on features made up for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.datasets import PairDataset
from evaluation.features import PairFeatures
from evaluation.gallery_content import (
    Collection,
    find_negatives,
    search_captions,
    search_images,
    view_prototypes,
)
from evaluation.search import Query

from .conftest import image_bytes, write_shard

NAMES = ("moon", "moon", "sun", "star", "moon", "sun", "cloud")
CAPTIONS = ("moon icon", "moon, thin icon", "sun icon", "star icon", "moon icon", "sun, thin icon", "cloud icon")


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    """Seven pairs with six different captions of four concepts; the last has no concept."""
    samples = []
    for i, (name, caption) in enumerate(zip(NAMES, CAPTIONS)):
        sample = {"png": image_bytes(i), "txt": caption.encode()}
        if name != "cloud":
            sample["json"] = json.dumps({"concept": name}).encode()
        samples.append((f"{i}", sample))
    write_shard(tmp_path / "0.tar", samples)
    texts = unit(7, 5, seed=1)
    texts[4] = texts[0]  # the same caption
    return Collection(PairDataset(str(tmp_path / "0.tar")), PairFeatures(unit(7, 5, seed=0), texts))


def test_texts_to_images(collection: Collection) -> None:
    queries = [Query("moon"), collection.query(6), Query("dragon"), Query("whatever", "Sun")]
    features = unit(4, 5, seed=2)
    found = search_images(collection, queries, features, [None, 6, None, None])
    right = [{0, 1, 4}, {6}, set(), {2, 5}]
    for search, feature, ones in zip(found, features, right):
        scores = (collection.features.image_features @ feature).tolist()
        order = sorted(range(7), key=lambda i: -scores[i])
        assert [hit.image for hit in search.hits] == order[:6]
        assert [hit.matches for hit in search.hits] == [i in ones for i in order[:6]]
        assert search.right == len(ones)
        assert search.first_right == (min(order.index(i) for i in ones) + 1 if ones else None)
        assert search.own_rank == (order.index(6) + 1 if search.own == 6 else None)
    assert search_images(collection, [], features[:0], []) == []


def test_images_to_captions(collection: Collection) -> None:
    assert collection.distinct == [0, 1, 2, 3, 5, 6]
    outside = unit(1, 5, seed=3)
    first, moon, cloud = search_captions(collection, [4, 6], outside)
    for search, image in (
        (first, outside[0]),
        (moon, collection.features.image_features[4]),
        (cloud, collection.features.image_features[6]),
    ):
        scores = {i: float(collection.features.text_features[i] @ image) for i in collection.distinct}
        order = sorted(scores, key=lambda i: -scores[i])
        assert [hit.pair for hit in search.hits] == order[:5]
        assert [hit.similarity for hit in search.hits] == pytest.approx([scores[i] for i in order[:5]])
        if search is not first:
            # Pair 4 has the caption of pair 0, which stands for both.
            assert search.own_rank == order.index(0 if search.own == 4 else 6) + 1
    assert (first.own, first.file, first.own_rank) == (None, 0, None)
    assert {hit.matches for hit in first.hits} == {None}
    assert {hit.pair: hit.matches for hit in moon.hits}.items() <= {
        0: True, 1: True, 2: False, 3: False, 5: False, 6: False
    }.items()  # fmt: skip
    assert {hit.pair: hit.pairs for hit in moon.hits}.items() <= {0: 2, 1: 1, 2: 1, 3: 1, 5: 1, 6: 1}.items()


def test_negatives_that_may_be_right(collection: Collection) -> None:
    """The images of the two suns are changed round: each prefers the other's caption, of the same concept.

    The star's image is nearer to the cloud's caption, which has nothing in common with its own.
    """
    texts = torch.eye(7, 7)
    texts[4] = texts[0]
    images = texts.clone()
    images[[2, 5]] = images[[5, 2]]
    images[3] = F.normalize(0.5 * texts[3] + texts[6], dim=0)
    collection.features = PairFeatures(images, texts)
    of_images, of_captions = find_negatives(collection)
    assert (of_images.ahead, of_images.ahead_alike) == (3, 2)
    assert [(entry.anchor, entry.negative) for entry in of_images.listed[:3]] == [(2, 5), (5, 2), (3, 6)]
    assert [(entry.anchor, entry.negative) for entry in of_captions.listed[:2]] == [(2, 5), (5, 2)]
    assert (of_captions.ahead, of_captions.ahead_alike) == (2, 2)


def test_prototypes_are_shown_with_what_is_near(collection: Collection) -> None:
    """W1 is compared with images, W2 with texts."""
    images, texts = collection.features
    prototypes = torch.stack((texts[[3, 2]], images[[6, 5]]))
    for side, anchors, weights in zip(view_prototypes(collection, prototypes, 0.2), (images, texts), prototypes):
        shares = (anchors @ weights.T / 0.2).softmax(dim=1).mean(dim=0)
        assert side.usage.shares.tolist() == pytest.approx(shares.tolist(), rel=1e-5)
        assert [entry.number for entry in side.top] == shares.argsort(descending=True).tolist()
        assert sum(side.histogram) == 2
        for entry in side.top:
            assert entry.share == pytest.approx(shares[entry.number].item(), rel=1e-5)
            near = (images @ weights[entry.number]).argsort(descending=True).tolist()
            assert [i for i, _ in entry.images] == near[:6]
            scores = {i: float(texts[i] @ weights[entry.number]) for i in collection.distinct}
            assert [i for i, _ in entry.captions] == sorted(scores, key=lambda i: -scores[i])[:5]
