"""What is measured: retrieval on pairs and zero-shot classification, for a model in memory, on one or more ranks.

In-training evaluation calls the two functions here; the command line tool calls them for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evaluation import retrieval, zero_shot
from evaluation.datasets import ClassificationSource, PairDataset, Share
from evaluation.features import (
    AutocastContext,
    DualEncoder,
    PairFeatures,
    encode_images,
    encode_share,
    evaluating,
    gather_pairs,
    normalized,
)
from evaluation.ranks import alone

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Setting:
    """How an evaluation runs.

    Args:
        device: where the model is.
        batch_size: samples encoded at a time on each rank.
        workers: loader processes of each rank.
        autocast_context: called for every forward.
        image_dtype: what the image tower takes: another one for a model whose weights are not float32.
        rank, world_size: this process among the ranks of the default process group.
        together: does something that may fail on this rank alone so that all ranks learn of it (`Place.together`).
    """

    device: torch.device | str = "cpu"
    batch_size: int = 256
    workers: int = 0
    autocast_context: AutocastContext = nullcontext
    image_dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    together: Callable[[Callable[[], Any]], Any] = alone

    def loader(self, dataset: Share, worker_init_fn: Callable[[int], None] | None = None) -> Iterable[dict[str, Any]]:
        """A loader of this rank's share, in order, without dropping the last batch.

        Args:
            worker_init_fn: called in each loader process when it begins.

        Raises:
            ValueError: if the data set is another rank's share.
        """
        if (dataset.rank, dataset.world_size) != (self.rank, self.world_size):
            share = f"rank {dataset.rank} of {dataset.world_size}"
            raise ValueError(f"the data set is the share of {share}, the setting is {self.rank} of {self.world_size}.")
        pin_memory = torch.device(self.device).type == "cuda"
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.workers,
            pin_memory=pin_memory,
            worker_init_fn=worker_init_fn,
        )


@dataclass
class Measured:
    """metrics: name → value; chance: name → what guessing scores (None: no closed form); counts: name → number.

    All names begin with the task: `retrieval/`, `retrieval_same_caption/` or `zeroshot/`.
    """

    metrics: Metrics = field(default_factory=dict)
    chance: Metrics = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, task: str, metrics: Metrics | dict[str, float], chance: Metrics) -> None:
        """Put the metrics of one task in, under its name."""
        self.metrics.update({f"{task}/{name}": value for name, value in metrics.items()})
        self.chance.update({f"{task}/{name}": chance.get(name) for name in metrics})

    def update(self, other: Measured) -> None:
        """Put all of another measurement in."""
        self.metrics.update(other.metrics)
        self.chance.update(other.chance)
        self.counts.update(other.counts)


def measure_pairs(model: DualEncoder, pairs: PairDataset, setting: Setting) -> tuple[Measured, PairFeatures]:
    """Retrieval over all pairs, counted twice: only the own partner is right, or any partner of the same caption.

    Args:
        model: an open_clip model, not wrapped in DDP; its train or eval mode is the same afterwards.
        pairs: this rank's share, with a transform and a tokenizer.
        setting: how to run; all ranks call this together.

    Returns:
        The measurement, the same on every rank, and the features of all pairs in global order.
    """
    share = setting.together(
        lambda: encode_share(
            model,
            setting.loader(pairs),
            setting.device,
            setting.autocast_context,
            image_dtype=setting.image_dtype,
        )
    )
    features = gather_pairs(share, setting.world_size)
    ids = pairs.caption_ids()
    score = partial(retrieval.retrieval_metrics, *features, rank=setting.rank, world_size=setting.world_size)
    measured = Measured(counts={"pairs": pairs.total, "distinct_captions": int(ids.max()) + 1})
    measured.add("retrieval", score(), retrieval.chance_metrics(pairs.total))
    measured.add(
        "retrieval_same_caption",
        score(caption_ids=ids),
        retrieval.chance_metrics(pairs.total, ids),
    )
    return measured, features


def measure_classification(
    model: DualEncoder,
    tokenizer: Callable[[list[str]], Tensor],
    source: ClassificationSource,
    setting: Setting,
) -> Measured:
    """Zero-shot classification with the source's class names and templates.

    Args:
        model: an open_clip model, not wrapped in DDP; its train or eval mode is the same afterwards.
        tokenizer: list of strings → tokens.
        source: with this rank's share of the images and a transform.
        setting: how to run; all ranks call this together.

    Returns:
        The measurement, the same on every rank.
    """

    def encode_text(tokens: Tensor) -> Tensor:
        with setting.autocast_context():
            return model.encode_text(tokens)

    def head_of_all_classes() -> Tensor:
        with evaluating(model):
            return zero_shot.build_class_head(
                encode_text, tokenizer, source.class_names, source.templates, setting.device, setting.batch_size
            )

    head = setting.together(head_of_all_classes)
    loader = setting.loader(source.dataset)
    features, labels = setting.together(
        lambda: encode_images(model, loader, setting.device, setting.autocast_context, image_dtype=setting.image_dtype)
    )
    metrics = zero_shot.zero_shot_metrics(features, labels, head, world_size=setting.world_size)
    measured = Measured(counts={"zeroshot_images": source.dataset.total, "zeroshot_classes": len(source.class_names)})
    measured.add("zeroshot", metrics, zero_shot.chance_metrics(len(source.class_names)))
    return measured


def encode_queries(
    model: DualEncoder, tokenizer: Callable[[list[str]], Tensor], queries: list[str], setting: Setting
) -> Tensor:
    """Text features of a few queries: [len(queries), d] float32, L2-normalised, on the setting's device."""
    with evaluating(model), setting.autocast_context():
        return normalized(model.encode_text(tokenizer(queries).to(setting.device)))
