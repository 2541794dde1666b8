"""What the gallery page shows of a model: searches both ways, the hardest negatives, and what prototypes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.collectives import exact_float32
from evaluation.datasets import PairDataset
from evaluation.features import PairFeatures
from evaluation.hard_negatives import HardNegative, hardest_negatives, near_duplicates, worst
from evaluation.prototype_usage import PrototypeUsage, prototype_usage, usage_histogram
from evaluation.retrieval import TIE_TOLERANCE
from evaluation.search import Hit, Query, is_match, nearest_images

IMAGES = 6  # found per query
CAPTIONS = 5  # found per image
LISTED_NEGATIVES = 9
LISTED_PROTOTYPES = 6


class TextSearch(NamedTuple):
    """One text and the images nearest to it.

    Attributes:
        query: the text.
        own: the pair whose caption it is; None for a text from outside.
        hits: the nearest images.
        right: how many images of the set are right.
        first_right: rank of the nearest right image; None if the set has none. Rank 1 is the nearest.
        own_rank: rank of the caption's own image.
    """

    query: Query
    own: int | None
    hits: list[Hit]
    right: int
    first_right: int | None
    own_rank: int | None


class CaptionHit(NamedTuple):
    """One caption found: the first pair that has it, cosine similarity, whether it is right, and how many pairs have it.

    `matches` is None where nothing is known of the image.
    """

    pair: int
    similarity: float
    matches: bool | None
    pairs: int


class ImageSearch(NamedTuple):
    """One image and the captions nearest to it.

    Attributes:
        own: the pair whose image it is; None for an image from outside.
        file: its number among the images from outside; None for an image of the set.
        hits: the nearest captions, each different one once.
        own_rank: rank of its own caption among the different captions.
    """

    own: int | None
    file: int | None
    hits: list[CaptionHit]
    own_rank: int | None


class NegativeSide(NamedTuple):
    """The hardest negatives of the anchors of one side.

    Attributes:
        listed: those with the largest margin.
        ahead: of how many anchors a negative is nearer than the own partner.
        ahead_alike: how many of these negatives show the same concept or have a nearly equal caption.
    """

    listed: list[HardNegative]
    ahead: int
    ahead_alike: int


class Prototype(NamedTuple):
    """One prototype: its share u_j in the normalizers, and its nearest images and captions with their cosines."""

    number: int
    share: float
    images: list[tuple[int, float]]
    captions: list[tuple[int, float]]


class PrototypeSide(NamedTuple):
    """One matrix of prototypes: its usage, a histogram of it, and the most used prototypes."""

    usage: PrototypeUsage
    histogram: list[int]
    top: list[Prototype]


class Collection:
    """The n pairs that are searched: their features, captions and concepts.

    Args:
        pairs: all of them (one rank).
        features: theirs; kept on their device.
    """

    def __init__(self, pairs: PairDataset, features: PairFeatures) -> None:
        self.pairs, self.features = pairs, features
        self.captions = pairs.captions()
        self.concepts = [pairs.concept(i) for i in range(pairs.total)]
        self.caption_ids = pairs.caption_ids()

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def distinct(self) -> list[int]:
        """For each different caption the first pair that has it."""
        first: dict[int, int] = {}
        for i, number in enumerate(self.caption_ids.tolist()):
            first.setdefault(number, i)
        return list(first.values())

    @cached_property
    def distinct_features(self) -> Tensor:
        """[different captions, d] float32: the features of the different captions."""
        return self.features.text_features[self.distinct]

    def describe(self, i: int) -> tuple[str, str]:
        """Caption and concept of pair i."""
        return self.captions[i], self.concepts[i]

    def query(self, i: int) -> Query:
        """The caption of pair i as a query."""
        return Query(*self.describe(i))

    def same_concept(self, i: int, j: int) -> bool:
        """Whether two pairs are known to show the same concept."""
        first, second = (self.concepts[k].strip().casefold() for k in (i, j))
        return bool(first) and first == second

    def alike(self, i: int, j: int) -> bool:
        """Whether two pairs with different captions may well be right for each other: so alike are concepts or captions."""
        return self.same_concept(i, j) or near_duplicates(self.captions[i], self.captions[j])


def search_images(
    collection: Collection, queries: Sequence[Query], query_features: Tensor, own: Sequence[int | None]
) -> list[TextSearch]:
    """The images nearest to texts.

    Args:
        queries: Q texts.
        query_features: [Q, d] float32, L2-normalised.
        own: for each the pair whose caption it is, or None.
    """
    if not queries:
        return []
    images = collection.features.image_features
    with exact_float32(images.device):
        hits = nearest_images(queries, query_features, images, collection.describe, IMAGES)
        scores = (query_features @ images.T).cpu()
    found = []
    for query, pair, row, near in zip(queries, own, scores, hits):
        right = [i for i in range(len(collection)) if is_match(query, *collection.describe(i))]
        first = rank_of(row, row[right].max()) if right else None
        found.append(
            TextSearch(query, pair, near, len(right), first, None if pair is None else rank_of(row, row[pair]))
        )
    return found


def search_captions(collection: Collection, own: Sequence[int], file_features: Tensor) -> list[ImageSearch]:
    """The captions nearest to images, each different caption once.

    Args:
        own: pairs whose images are searched with.
        file_features: [F, d] float32, L2-normalised: more images, from outside; F may be 0.

    Returns:
        The searches with the images from outside, then those with the images of the set.
    """
    number = len(file_features)
    anchors = torch.cat((file_features, collection.features.image_features[list(own)]))
    with exact_float32(anchors.device):
        scores = (anchors @ collection.distinct_features.T).cpu()
    place = {int(collection.caption_ids[pair]): column for column, pair in enumerate(collection.distinct)}
    counts = collection.caption_ids.bincount().tolist()
    found = []
    for file, row in enumerate(scores):
        pair = own[file - number] if file >= number else None
        hits = []
        for similarity, column in zip(*(x.tolist() for x in row.topk(min(CAPTIONS, len(row))))):
            j = collection.distinct[column]
            matches = None if pair is None else is_match(collection.query(pair), *collection.describe(j))
            hits.append(CaptionHit(j, similarity, matches, counts[int(collection.caption_ids[j])]))
        if pair is None:
            found.append(ImageSearch(None, file, hits, None))
        else:
            rank = rank_of(row, row[place[int(collection.caption_ids[pair])]])
            found.append(ImageSearch(pair, None, hits, rank))
    return found


def rank_of(scores: Tensor, score: Tensor) -> int:
    """1 + how many of the scores [N] are above `score`; those that differ by rounding alone are not."""
    return 1 + int((scores > score + TIE_TOLERANCE).sum())


def find_negatives(collection: Collection) -> tuple[NegativeSide, NegativeSide]:
    """The hardest negatives of the images (captions of other pairs), and of the captions (images of other pairs)."""
    images, texts = collection.features
    return _negative_side(collection, images, texts), _negative_side(collection, texts, images)


def _negative_side(collection: Collection, anchors: Tensor, candidates: Tensor) -> NegativeSide:
    negatives = hardest_negatives(anchors, candidates, collection.caption_ids)
    ahead = (negatives.similarity > negatives.positive).nonzero()[:, 0].tolist()
    alike = sum(collection.alike(i, int(negatives.index[i])) for i in ahead)
    return NegativeSide(worst(negatives, LISTED_NEGATIVES), len(ahead), alike)


def view_prototypes(
    collection: Collection, prototypes: Tensor, temperature: float
) -> tuple[PrototypeSide, PrototypeSide]:
    """W1, which stands for texts and is used by images, and W2, which stands for images and is used by texts.

    Args:
        prototypes: [2, m, d] float32, L2-normalised.
        temperature: τ.
    """
    unit = prototypes.to(collection.features.image_features.device)
    sides = [
        _prototype_side(collection, weights, prototype_usage(anchors, weights, temperature))
        for weights, anchors in zip(unit, collection.features)
    ]
    return sides[0], sides[1]


def _prototype_side(collection: Collection, weights: Tensor, usage: PrototypeUsage) -> PrototypeSide:
    top = usage.shares.argsort(descending=True, stable=True)[:LISTED_PROTOTYPES]
    with exact_float32(weights.device):
        chosen = weights[top.to(weights.device)]
        images = (chosen @ collection.features.image_features.T).cpu()
        captions = (chosen @ collection.distinct_features.T).cpu()
    views = []
    for number, to_images, to_captions in zip(top.tolist(), images, captions):
        nearest = to_images.topk(min(IMAGES, len(to_images)))
        closest = to_captions.topk(min(CAPTIONS, len(to_captions)))
        views.append(
            Prototype(
                number,
                usage.shares[number].item(),
                list(zip(nearest.indices.tolist(), nearest.values.tolist())),
                [(collection.distinct[c], s) for c, s in zip(closest.indices.tolist(), closest.values.tolist())],
            )
        )
    return PrototypeSide(usage, usage_histogram(usage.shares), views)
