"""The shares of prototypes against plain loops, and prototypes read from what training saves."""

from __future__ import annotations

import math
from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import prototype_usage as module
from evaluation.errors import UserError
from evaluation.prototype_usage import effective_number, prototype_usage, read_prototypes, usage_histogram
from neuclip.normalizers import PrototypeNormalizer, Unified, UnitRowsAdaGradNorm
from neuclip.pairwise import GlobalBatch


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def reference(anchors: Tensor, prototypes: Tensor, temperature: float) -> tuple[list[float], float, float]:
    """Shares, effective number, and that of one anchor on average, number by number."""
    shares, per_anchor = [0.0] * len(prototypes), 0.0
    for anchor in anchors.tolist():
        terms = [math.exp(sum(map(mul, anchor, row)) / temperature) for row in prototypes.tolist()]
        own = [term / sum(terms) for term in terms]
        shares = [share + part / len(anchors) for share, part in zip(shares, own)]
        per_anchor += math.exp(-sum(part * math.log(part) for part in own)) / len(anchors)
    return shares, math.exp(-sum(share * math.log(share) for share in shares)), per_anchor


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("block_elements", [1, 40, 1 << 20])
def test_equals_plain_loops(temperature: float, block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    anchors, prototypes = unit(11, 5, seed=0), unit(7, 5, seed=1)
    shares, effective, per_anchor = reference(anchors, prototypes, temperature)
    usage = prototype_usage(anchors, prototypes, temperature)
    assert usage.shares.tolist() == pytest.approx(shares, rel=1e-5)
    assert usage.shares.sum().item() == pytest.approx(1)
    assert usage.effective == pytest.approx(effective, rel=1e-5)
    assert usage.effective_per_anchor == pytest.approx(per_anchor, rel=1e-5)
    assert 1 < usage.effective_per_anchor < usage.effective < 7


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="0 anchors"):
        prototype_usage(torch.empty(0, 3), unit(2, 3, seed=0), 0.1)


def test_effective_number_has_its_extremes() -> None:
    assert effective_number(torch.full((8,), 1 / 8)).item() == pytest.approx(8)
    assert effective_number(torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])).tolist() == pytest.approx([1, 2])


def test_histogram_counts_each_prototype_once() -> None:
    factors = [0.0, 0.1, 0.25, 0.3, 1.0, 1.5, 2.0, 2.85]
    shares = torch.tensor(factors, dtype=torch.float64) / 8
    assert sum(factors) == pytest.approx(8)
    # edges at 1/4, 1/2, 1, 2, 4
    assert usage_histogram(shares, doublings=3) == [2, 2, 0, 2, 2, 0]


def saved(path: Path, state: dict[str, Any], name: str = "neuclip") -> Path:
    torch.save({"state_dict": {}, "objective": {"name": name, "state_dict": state}}, path)
    return path


def test_what_training_saves(tmp_path: Path) -> None:
    """Side 0 stands for texts; rows that are not in use yet are left out; the prediction is the mean over the rest."""
    normalizer = PrototypeNormalizer(6, 5, 0.0, Unified(), lambda shape: UnitRowsAdaGradNorm(shape, 1.0), 4)
    images, texts = unit(4, 5, seed=3), unit(4, 5, seed=4)
    batch = GlobalBatch(torch.stack((images, texts)), (images * texts).sum(dim=1), 0, 4)
    normalizer.observe(batch)
    normalizer.restart(batch)
    state = {f"normalizer.{key}": value for key, value in normalizer.state_dict().items()}
    found = read_prototypes(saved(tmp_path / "epoch_1.pt", state))
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, torch.stack((texts, images)))
    predicted = normalizer.predict(batch, torch.tensor(10.0))
    for side, anchors in enumerate((images, texts)):
        terms = ((anchors @ found[side].T - batch.positive[:, None]) * 10.0).exp()
        torch.testing.assert_close(terms.mean(dim=1).log(), predicted[side])


def test_why_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pt"
    prototypes = torch.zeros(2, 3, 4)
    for state, reason in (
        ({"normalizer.weights": torch.ones(2, 3, 4)}, "Objective neuclip keeps no prototypes"),
        ({"normalizer.prototypes": torch.ones(3, 4)}, "keeps no prototypes"),
        ({"normalizer.prototypes": prototypes, "normalizer._extra_state": {"active": 0}}, "was in use yet"),
    ):
        found = read_prototypes(saved(path, state))
        assert isinstance(found, str)
        assert reason in found
    torch.save({"state_dict": {}}, path)
    assert "no state of an objective" in str(read_prototypes(path))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"epoch_1\.pt cannot be read"):
        read_prototypes(path)
