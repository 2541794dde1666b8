"""The class head against a computation by hand, and accuracies against counting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.zero_shot import build_class_head, chance_metrics, fill_template, zero_shot_metrics

NAMES = ["cat", "a dog", "bird", "newt", "ox", "eel", "fly"]
TEMPLATES = ["a photo of a {c}.", "{c}", lambda name: f"the {name} in a lake"]
TABLE = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tokenize(texts: list[str]) -> Tensor:
    """[B, 2]: two numbers that tell the prompts apart."""
    return torch.tensor([[sum(text.encode()) % 200, len(text)] for text in texts])


def encode(tokens: Tensor) -> Tensor:
    """Lengths far from 1, as raw tower output has them."""
    return TABLE[tokens[:, 0]] * tokens[:, 1:]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 256])
def test_head_by_hand(batch_size: int) -> None:
    sizes = []

    def counted(tokens: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return encode(tokens)

    head = build_class_head(counted, tokenize, NAMES, TEMPLATES, batch_size=batch_size)
    rows = []
    for name in NAMES:
        prompts = [f"a photo of a {name}.", name, f"the {name} in a lake"]
        vectors = encode(tokenize(prompts))
        mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    torch.testing.assert_close(head, torch.stack(rows).float(), rtol=0, atol=1e-6)
    assert head.dtype == torch.float32
    assert max(sizes) <= batch_size
    assert sum(sizes) == len(NAMES) * len(TEMPLATES)


def test_head_mistakes() -> None:
    with pytest.raises(ValueError, match="0 templates"):
        build_class_head(encode, tokenize, NAMES, [])
    with pytest.raises(ValueError, match=r"no \{c\}"):
        fill_template("a photo", "cat")
    assert fill_template("{c} {x}", "cat") == "cat {x}"


def test_metrics_by_counting() -> None:
    generator = torch.Generator().manual_seed(1)
    head = F.normalize(torch.randn(9, 5, generator=generator), dim=-1)
    features = F.normalize(torch.randn(77, 5, generator=generator), dim=-1)
    labels = torch.randint(0, 7, (77,), generator=generator)  # classes 7 and 8 do not occur
    got = zero_shot_metrics(features, labels, head, block=10)
    order = (features @ head.T).argsort(dim=1, descending=True)
    first = order[:, 0] == labels
    assert got["top1"] == pytest.approx(float(first.double().mean()))
    assert got["top5"] == pytest.approx(float((order[:, :5] == labels[:, None]).any(1).double().mean()))
    recalls = [float(first[labels == label].double().mean()) for label in range(7)]
    assert got["mean_per_class_recall"] == pytest.approx(sum(recalls) / 7)
    assert got["mean_per_class_recall"] != pytest.approx(got["top1"])


def test_top5_needs_five_classes() -> None:
    got = zero_shot_metrics(torch.eye(4), torch.arange(4), torch.eye(4))
    assert got == {"top1": 1.0, "top5": None, "mean_per_class_recall": 1.0}
    assert chance_metrics(4)["top5"] is None
    assert chance_metrics(5)["top5"] == 1


def test_a_collapsed_model_scores_chance() -> None:
    head = F.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), dim=-1).expand(10, -1)
    got = zero_shot_metrics(head[:1].expand(30, -1), torch.arange(30) % 10, head)
    for name, chance in chance_metrics(10).items():
        assert got[name] == pytest.approx(chance), name


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.eye(4), torch.tensor([0, 1, 2, 4]), r"labels 0 … 4 do not fit 4 class names"),
        (torch.eye(4), torch.tensor([0, 1, 2, -1]), "labels -1"),
        (torch.full((4, 4), torch.nan), torch.arange(4), "not finite"),
        (torch.empty(0, 0), torch.empty(0, dtype=torch.int64), "no sample"),
    ],
)
def test_mistakes(features: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot_metrics(features, labels, torch.eye(4))
