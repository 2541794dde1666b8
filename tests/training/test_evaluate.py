"""Evaluation between epochs: which sets are due, names and values of the metrics."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from end_to_end.corpus import CLASS_SAMPLES, COLOURS, VALIDATION_SIZE, Corpus, build_corpus
from small_training import ALONE, EMBED_DIM, VOCABULARY, SmallModel
from training.errors import UserError
from training.evaluate import Evaluator, batched_contrastive_loss
from training.model import ModelBundle, TwoTowers
from training.precision import Precision


def _features(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = F.normalize(torch.randn(2, count, 5, generator=generator, dtype=torch.float64), dim=2)
    return images, texts


@pytest.mark.parametrize(("count", "batch"), [(12, 4), (13, 4), (3, 8), (9, 1)])
def test_batched_contrastive_loss_by_hand(count: int, batch: int) -> None:
    images, texts = _features(count)
    scale = torch.tensor(7.0, dtype=torch.float64)
    total = 0.0
    for start in range(0, count, batch):
        rows = range(start, min(start + batch, count))
        for i in rows:
            for own, others in ((images, texts), (texts, images)):
                logits = [7.0 * float(own[i] @ others[j]) for j in rows]
                largest = max(logits)
                log_sum = largest + math.log(sum(math.exp(value - largest) for value in logits))
                total += 0.5 * (log_sum - 7.0 * float(images[i] @ texts[i]))
    assert batched_contrastive_loss(images, texts, scale, batch) == pytest.approx(total / count, rel=1e-9)


def test_contrastive_loss_of_nothing_is_no_number() -> None:
    images, texts = _features(0)
    assert math.isnan(batched_contrastive_loss(images, texts, torch.tensor(1.0), 4))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def _preprocess(image: Any) -> Tensor:
    return (
        torch.tensor(list(image.resize((2, 2)).tobytes()), dtype=torch.float32).reshape(2, 2, 3).permute(2, 0, 1) / 255
    )


def _tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[sum(map(ord, text)) % VOCABULARY, len(text) % VOCABULARY] for text in texts])


BUNDLE = ModelBundle(TwoTowers(SmallModel()), _preprocess, _preprocess, _tokenize, EMBED_DIM)


def _evaluator(**given: Any) -> Evaluator:
    sets = {"val_data": None, "imagenet_val": None, "imagenet_v2": None, "zeroshot_data": None}
    numbers = {"val_num_samples": None, "epochs": 10, "val_frequency": 1, "zeroshot_frequency": 1}
    args = Namespace(**{**sets, **numbers, "batch_size": 8, "workers": 0, "dataset_type": "auto", **given})
    return Evaluator(args, BUNDLE, ALONE, Precision("fp32", "cpu"))


def test_nothing_asked_for_gives_nothing() -> None:
    assert _evaluator()(BUNDLE.towers, 10) == {}


def test_names_and_values_of_pairs(corpus: Corpus) -> None:
    metrics = _evaluator(val_data=corpus.validation)(BUNDLE.towers, 1)
    ranks = {f"{way}_{name}" for way in ("image_to_text", "text_to_image") for name in ("mean_rank", "median_rank")}
    recalls = {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    same_caption = {f"retrieval_same_caption/{name}" for name in ranks | recalls}
    assert metrics.keys() == ranks | recalls | same_caption | {"clip_val_loss", "num_samples"}
    assert metrics["num_samples"] == VALIDATION_SIZE
    # The same by the towers themselves, in batches of eight.
    from evaluation.datasets import PairDataset

    pairs = PairDataset(corpus.validation, _preprocess, _tokenize)
    samples = [pairs[index] for index in range(len(pairs))]
    with torch.no_grad():
        images, texts, scale, _ = BUNDLE.towers(
            torch.stack([sample["image"] for sample in samples]), torch.stack([sample["text"] for sample in samples])
        )
    assert metrics["clip_val_loss"] == pytest.approx(batched_contrastive_loss(images, texts, scale, 8), rel=1e-5)


def test_names_and_values_of_classes(corpus: Corpus) -> None:
    evaluator = _evaluator(zeroshot_data=corpus.zeroshot, imagenet_val=corpus.zeroshot, imagenet_v2=corpus.zeroshot)
    metrics = evaluator(BUNDLE.towers, 1)
    prefixes = ("zeroshot-val", "imagenet-zeroshot-val", "imagenetv2-zeroshot-val")
    names = ("top1", "top5", "mean-per-class-recall")
    assert metrics.keys() == {f"{prefix}-{name}" for prefix in prefixes for name in names}
    for name in names:
        values = {metrics[f"{prefix}-{name}"] for prefix in prefixes}
        assert len(values) == 1, "the same set under three flags"
    top1 = metrics["zeroshot-val-top1"]
    samples = CLASS_SAMPLES * len(COLOURS)
    assert 0 <= top1 <= metrics["zeroshot-val-top5"] <= 1
    assert top1 * samples == pytest.approx(round(top1 * samples, 3))
    # Every class has as many samples as any other.
    assert metrics["zeroshot-val-mean-per-class-recall"] == pytest.approx(top1)


@pytest.mark.parametrize(
    ("frequency", "last", "due"),
    [(1, 4, [1, 2, 3, 4]), (2, 5, [2, 4, 5]), (3, 4, [3, 4]), (0, 4, []), (9, 4, [4])],
)
@pytest.mark.parametrize("kind", ["val", "zeroshot"])
def test_due_epochs(kind: str, frequency: int, last: int, due: list[int], corpus: Corpus) -> None:
    data = {"val": {"val_data": corpus.validation}, "zeroshot": {"zeroshot_data": corpus.zeroshot}}[kind]
    evaluator = _evaluator(**data, **{f"{kind}_frequency": frequency}, epochs=last)
    done: list[int] = []
    evaluator._validate = lambda *given: done.append(epoch) or {}  # type: ignore[assignment, method-assign]
    evaluator._classify = lambda *given: done.append(epoch) or {}  # type: ignore[assignment, method-assign]
    for epoch in range(1, last + 1):
        evaluator(BUNDLE.towers, epoch)
    assert done == due


def test_model_is_in_training_mode_afterwards(corpus: Corpus) -> None:
    BUNDLE.towers.train()
    _evaluator(val_data=corpus.validation, zeroshot_data=corpus.zeroshot)(BUNDLE.towers, 1)
    assert BUNDLE.towers.training
    assert BUNDLE.towers.model.training


@pytest.mark.parametrize("flag", ["val_data", "zeroshot_data", "imagenet_val", "imagenet_v2"])
def test_absent_set_is_refused_by_its_flag(flag: str, tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.tar")
    with pytest.raises(UserError) as refusal:
        _evaluator(**{flag: path})
    assert str(refusal.value).startswith(f"--{flag.replace('_', '-')} {path}")
