"""Evaluation between epochs: validation pairs and zero-shot classification, on all ranks, by the code of `evaluation`."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from evaluation.csv_pairs import CsvPairs
from evaluation.datasets import ClassificationSource, PairDataset, Share, open_classification
from evaluation.features import PairFeatures
from evaluation.suite import Setting, measure_classification, measure_pairs
from training.data.workers import heed_parent_only
from training.distributed import World
from training.errors import UserError
from training.model import ModelBundle, TwoTowers
from training.precision import Precision

# flag → prefix of the metric names, as open_clip spells them
_ZERO_SHOT = {
    "imagenet_val": "imagenet-zeroshot-val",
    "imagenet_v2": "imagenetv2-zeroshot-val",
    "zeroshot_data": "zeroshot-val",
}

# name of a measurement → end of its name in results.jsonl, as open_clip spells them
_ZERO_SHOT_METRICS = {
    "zeroshot/top1": "top1",
    "zeroshot/top5": "top5",
    "zeroshot/mean_per_class_recall": "mean-per-class-recall",
}

_INTERRUPTED = "the run has been asked to end"


class Evaluator:
    """Opens the evaluation sets that the flags name, and runs those that are due.

    Args:
        args: the resolved command line.
        bundle: gives preprocessing and tokenizer.
        world, precision: this rank's place; the towers' number format.
        interrupted: says that the run has been asked to end; an evaluation is then broken off between two batches.

    Attributes:
        pairs: the validation pairs, or None.
        last_features: on rank 0 their features at the last evaluation, if they were due; None otherwise.

    Raises:
        UserError: a set cannot be opened; the message names the flag.
    """

    def __init__(
        self,
        args: Namespace,
        bundle: ModelBundle,
        world: World,
        precision: Precision,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.args = args
        self.world = world
        self.precision = precision
        self.interrupted = interrupted
        self.tokenizer = bundle.tokenizer
        self.pairs: PairDataset | None = None
        self.last_features: PairFeatures | None = None
        if args.val_data:
            with _naming_flag("val_data", args.val_data):
                self.pairs = _open_pairs(args, bundle, world)
        self.classifications: dict[str, ClassificationSource] = {}
        for flag, prefix in _ZERO_SHOT.items():
            path = getattr(args, flag)
            if path:
                with _naming_flag(flag, path):
                    self.classifications[prefix] = open_classification(
                        path, bundle.preprocess_val, rank=world.rank, world_size=world.size
                    )

    def __call__(self, towers: TwoTowers, epoch: int) -> dict[str, float]:
        """Metrics of the sets that are due after `epoch` completed epochs; the same on every rank, empty if none is due."""
        metrics: dict[str, float] = {}
        self.last_features = None
        self._share_buffers(towers)
        try:
            if self.pairs is not None and self._is_due(epoch, self.args.val_frequency):
                metrics.update(self._validate(towers, self.pairs))
            if self._is_due(epoch, self.args.zeroshot_frequency):
                for prefix, source in self.classifications.items():
                    metrics.update(self._classify(towers, prefix, source))
        except UserError as error:
            # All ranks get here together. A broken image must not end a run of two days.
            reason = str(error).strip().splitlines()[-1]
            logging.error("evaluation after epoch %d broken off: %s", epoch, reason)
            if reason.startswith(_INTERRUPTED):
                # Made up for as a whole: an entry in results.jsonl would say that this epoch has been evaluated.
                return {}
        if metrics and self.world.is_main:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/" not in name)
            logging.info("evaluation after epoch %d: %s", epoch, shown)
        return metrics

    def _share_buffers(self, towers: TwoTowers) -> None:
        # Running statistics of batch normalisation differ by rank after a step; the checkpoint has rank 0's.
        if self.world.size > 1:
            for buffer in towers.model.buffers():
                dist.broadcast(buffer, src=0)

    def _is_due(self, epoch: int, frequency: int) -> bool:
        return frequency > 0 and (epoch % frequency == 0 or epoch == self.args.epochs)

    def _validate(self, towers: TwoTowers, pairs: PairDataset) -> dict[str, float]:
        measured, features = measure_pairs(towers.model, pairs, self._setting())
        metrics = {_spelled(name): value for name, value in measured.metrics.items() if value is not None}
        scale = towers.model.logit_scale.detach().float().exp().reshape(())
        metrics["clip_val_loss"] = batched_contrastive_loss(*features, scale, self.args.batch_size)
        metrics["num_samples"] = float(pairs.total)
        if self.world.is_main:
            self.last_features = features
        return metrics

    def _classify(self, towers: TwoTowers, prefix: str, source: ClassificationSource) -> dict[str, float]:
        scores = measure_classification(towers.model, self.tokenizer, source, self._setting()).metrics
        return {
            f"{prefix}-{name}": value for key, name in _ZERO_SHOT_METRICS.items() if (value := scores[key]) is not None
        }

    def _setting(self) -> Setting:
        return _Interruptible(
            device=self.world.device,
            batch_size=self.args.batch_size,
            workers=self.args.workers,
            autocast_context=self.precision.autocast,
            image_dtype=self.precision.input_dtype,
            rank=self.world.rank,
            world_size=self.world.size,
            together=self.world.check_together,
            interrupted=self.interrupted,
        )


@dataclass(frozen=True)
class _Interruptible(Setting):
    """Evaluation within a run: it is broken off when the run has been asked to end, and its workers leave signals alone."""

    interrupted: Callable[[], bool] = lambda: False

    def loader(self, dataset: Share) -> Iterator[dict[str, Any]]:
        """This rank's batches.

        Raises:
            UserError: while iterating: the run has been asked to end.
        """
        for batch in super().loader(dataset, heed_parent_only):
            if self.interrupted():
                raise UserError(f"{_INTERRUPTED}; the epoch is evaluated when it goes on")
            yield batch


def _spelled(name: str) -> str:
    """The name of a retrieval metric in results.jsonl; that of its plain form stands alone."""
    return name.removeprefix("retrieval/")


def batched_contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, batch_size: int) -> float:
    """Mean of the two cross-entropies over consecutive batches, weighted by their size.

    Args:
        images, texts: [n, d] float32, L2-normalised. logit_scale: 0-dim. A last batch of one sample counts 0, as it must.
    """
    total = 0.0
    for image, text in zip(images.split(batch_size), texts.split(batch_size)):
        logits = logit_scale * image @ text.T
        labels = torch.arange(len(image), device=image.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        total += loss.item() * len(image)
    return total / len(images) if len(images) else math.nan


def _open_pairs(args: Namespace, bundle: ModelBundle, world: World) -> PairDataset:
    transforms = (bundle.preprocess_val, bundle.tokenizer)
    share = {"rank": world.rank, "world_size": world.size, "limit": args.val_num_samples}
    if args.dataset_type == "csv" or args.val_data.lower().endswith((".csv", ".tsv")):
        columns = {"image_key": args.csv_img_key, "caption_key": args.csv_caption_key, "separator": args.csv_separator}
        return CsvPairs(args.val_data, *transforms, **columns, **share)
    return PairDataset(args.val_data, *transforms, **share)


@contextmanager
def _naming_flag(flag: str, value: str) -> Any:
    try:
        yield
    except UserError as error:
        spelled = f"--{flag.replace('_', '-')}"
        message = str(error)
        raise UserError(message if message.startswith(spelled) else f"{spelled} {value}: {message}") from None
