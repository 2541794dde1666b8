"""The part of the normalizers that comes from pairs with the same caption, against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from study import same_caption


@pytest.mark.parametrize("block", [2, 512])
def test_shares(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_caption, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.nn.functional.normalize(torch.randn(2, 9, 4, generator=generator), dim=-1)
    captions = torch.tensor([0, 1, 0, 2, 1, 0, 3, 4, 5])
    probes = torch.tensor([5, 0, 3, 1, 8])
    found = same_caption.shares(images, texts, captions, probes, 1 / 0.07)
    for probe, share in zip(probes.tolist(), found.tolist(), strict=True):
        terms = {j: math.exp(images[probe].double() @ texts[j].double() / 0.07) for j in range(9) if j != probe}
        same = sum(term for j, term in terms.items() if captions[j] == captions[probe])
        assert share == pytest.approx(same / sum(terms.values()), rel=1e-4)
    assert found[2] == found[4] == 0.0  # captions that come once
    assert found[0] > 0
