"""The hardest negatives against a search through all pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.hard_negatives import HardNegative, hardest_negatives, near_duplicates, worst


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def search(anchors: Tensor, candidates: Tensor, ids: list[int]) -> list[tuple[float, int, int]]:
    """(margin, anchor, hardest negative) of every anchor, largest margin first."""
    found = []
    for i, anchor in enumerate(anchors.double()):
        scores = [(float(anchor @ candidates[j].double()), -j) for j in range(len(ids)) if ids[j] != ids[i]]
        best, j = max(scores)
        found.append((best - float(anchor @ candidates[i].double()), i, -j))
    return sorted(found, key=lambda entry: (-entry[0], entry[1]))


@pytest.mark.parametrize("block", [1, 4, 7, 23, 1000])
def test_equals_a_search_through_all_pairs(block: int) -> None:
    images, texts = unit(23, 6, seed=1), unit(23, 6, seed=2)
    ids = [i % 17 for i in range(23)]  # six captions occur twice
    for anchors, candidates in ((images, texts), (texts, images)):
        negatives = hardest_negatives(anchors, candidates, torch.tensor(ids), block)
        expected = search(anchors, candidates, ids)
        listed = worst(negatives, 5)
        assert [(entry.anchor, entry.negative) for entry in listed] == [entry[1:] for entry in expected[:5]]
        assert [entry.margin for entry in listed] == pytest.approx([entry[0] for entry in expected[:5]], abs=1e-6)
        for entry in listed:
            assert entry.positive_similarity == pytest.approx(float(anchors[entry.anchor] @ candidates[entry.anchor]))
        assert len(worst(negatives, 100)) == 23


def test_an_equal_caption_is_no_negative() -> None:
    images = torch.eye(3)
    texts = torch.eye(3)[[1, 0, 2]]  # the images of pairs 0 and 1 are changed round
    ids = torch.tensor([5, 5, 6])
    assert hardest_negatives(images, texts, ids).index.tolist() == [2, 2, 0]
    assert hardest_negatives(images, texts, torch.arange(3)).index.tolist() == [1, 0, 0]


def test_one_caption_alone_has_none() -> None:
    negatives = hardest_negatives(unit(4, 3, seed=0), unit(4, 3, seed=1), torch.zeros(4, dtype=torch.int64))
    assert negatives.index.tolist() == [-1] * 4
    assert worst(negatives, 3) == []


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 captions"):
        hardest_negatives(torch.eye(3), torch.eye(3), torch.arange(2))


def test_margin() -> None:
    assert HardNegative(0, 1, 0.25, 0.75).margin == 0.5


def test_near_duplicates() -> None:
    assert near_duplicates("Keyhole, light icon of locked", "keyhole: bold icon of locked")  # 4 words of 6 in both
    assert near_duplicates("a b c", "c, b & d a")
    assert not near_duplicates("keyhole icon", "cooking pot icon")
    assert not near_duplicates("", "")
    assert not near_duplicates("a b c", "a b d e")
