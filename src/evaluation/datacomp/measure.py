"""One task of the suite, measured: from the local data and a model to the metrics of the public evaluation code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.collectives import exact_float32
from evaluation.datacomp import grouped
from evaluation.datacomp.grouped import Metrics
from evaluation.datacomp.labelled import LabelledImages
from evaluation.datacomp.locate import find_data, is_sharded, table_files
from evaluation.datacomp.pairs import ImageShare, ShardImages, TableImages, recall_metrics
from evaluation.datacomp.task_model import TaskModel, finite, gather_share
from evaluation.datacomp.tasks import Kind, Task
from evaluation.datacomp.winogavil import InstanceImages, Instances, jaccard_metrics
from evaluation.datasets import Share, numbered_shards, read_prompts
from evaluation.errors import UserError
from evaluation.zero_shot import Template

__all__ = ["TaskModel", "find_data", "measure_task"]


def measure_task(task: Task, data_dir: str | Path, model: TaskModel) -> Metrics:
    """Measure one task; all ranks of the model's setting call this together.

    Args:
        task: which one.
        data_dir: the folder of all sets; see `find_data`.
        model: what is evaluated, and how it runs.

    Returns:
        Metric name → value, the same on every rank: the names that the public code writes, and `main_metric` (None for
        the sets of faces). Shares are in 0 … 1; None where the public code has NaN.

    Raises:
        MissingData: if the set is not there.
        UserError: for data that are broken, or a model whose features are not finite; on every rank.
    """
    data_dir = Path(data_dir)
    measure: Callable[[Task, Path, TaskModel], Metrics]
    measure = {Kind.RETRIEVAL: _retrieval, Kind.WINOGAVIL: _winogavil, Kind.FACES: _faces}.get(task.kind, _classes)
    metrics = measure(task, data_dir, model)
    main = None if task.main_metric is None else metrics[task.main_metric]
    return {**metrics, "main_metric": main}


class Predictions(NamedTuple):
    """Of n images in global order: facts [n, f] float64 (as `LabelledImages` gives them), best [n, H] int64 (the class
    that each of H heads prefers) and top [n, k] int64 (the k = 5 highest classes of the first head; 1 if it has fewer
    than 5)."""

    facts: Tensor
    best: Tensor
    top: Tensor


def _classes(task: Task, data_dir: Path, model: TaskModel) -> Metrics:
    fields = grouped.FIELDS.get(task.key, ())

    def open_set() -> tuple[list[str], list[Template], LabelledImages]:
        folder = find_data(task, data_dir)
        names, templates = read_prompts(folder)
        return names, templates, _labelled(folder, model, len(names), len(fields))

    names, templates, images = model.together(open_set)
    predictions = _predict(model, images, [model.head(names, templates)])
    model.samples[task.key] = images.total
    labels, best = predictions.facts[:, 0].long(), predictions.best[:, 0]
    metrics = accuracies(labels, best, predictions.top)
    if task.key in grouped.LABELLED_METRICS:
        metrics.update(grouped.LABELLED_METRICS[task.key](predictions.facts, best, predictions.top))
    return metrics


def _faces(task: Task, data_dir: Path, model: TaskModel) -> Metrics:
    def open_set() -> tuple[dict[str, tuple[list[str], list[Template]]], LabelledImages]:
        folder = find_data(task, data_dir)
        return objective_prompts(folder), _labelled(folder, model, None, len(grouped.FIELDS[task.key]))

    prompts, images = model.together(open_set)
    heads = [model.head(*prompts[objective]) for objective in grouped.OBJECTIVES]
    predictions = _predict(model, images, heads)
    model.samples[task.key] = images.total
    return grouped.face_metrics(predictions.facts, predictions.best)


def _retrieval(task: Task, data_dir: Path, model: TaskModel) -> Metrics:
    def open_set() -> TableImages | ShardImages:
        folder = find_data(task, data_dir)
        return ShardImages(numbered_shards(folder)) if is_sharded(folder) else TableImages(table_files(task, data_dir))

    source = model.together(open_set)
    setting = model.setting
    images = _encode(model, ImageShare(source, model.preprocess_val, setting.rank, setting.world_size))
    texts = _encode_texts(model, [text for captions in source.captions for text in captions])
    counts = torch.tensor([len(captions) for captions in source.captions])
    model.samples[task.key] = len(counts)
    return {**recall_metrics(images, texts, torch.arange(len(counts)).repeat_interleave(counts))}


def _winogavil(task: Task, data_dir: Path, model: TaskModel) -> Metrics:
    def open_set() -> Instances:
        find_data(task, data_dir)
        return Instances(table_files(task, data_dir))

    source = model.together(open_set)
    setting = model.setting
    images = _encode(model, InstanceImages(source, model.preprocess_val, setting.rank, setting.world_size))
    texts = _encode_texts(model, source.prompts)
    model.samples[task.key] = len(source)
    return {**jaccard_metrics(images, texts, source.images, source.associated)}


def _labelled(folder: Path, model: TaskModel, number_of_classes: int | None, fields: int) -> LabelledImages:
    return LabelledImages(
        numbered_shards(folder),
        model.preprocess_val,
        number_of_classes=number_of_classes,
        fields=fields,
        rank=model.setting.rank,
        world_size=model.setting.world_size,
    )


def objective_prompts(folder: Path) -> dict[str, tuple[list[str], list[Template]]]:
    """Class names and templates of every objective of a set of faces, whose lines begin with "race:", "gender:" …

    Raises:
        UserError: for a line without such a beginning, or an objective without names or templates.
    """
    all_names, all_templates = read_prompts(folder)
    names, templates = _by_objective(folder, all_names), _by_objective(folder, map(str, all_templates))
    for objective in grouped.OBJECTIVES:
        if objective not in names or objective not in templates:
            raise UserError(
                f"{folder}: its text files have no lines that begin with {objective}:, for names or templates."
            )
    return {objective: (names[objective], list(templates[objective])) for objective in grouped.OBJECTIVES}


def _by_objective(folder: Path, lines: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines:
        objective, separator, text = line.partition(":")
        if not separator:
            wanted = ", ".join(f"{name}:" for name in grouped.OBJECTIVES)
            raise UserError(f"{folder}: the line {line!r} of its text files does not begin with one of {wanted}.")
        found.setdefault(objective, []).append(text)
    return found


def accuracies(labels: Tensor, best: Tensor, top: Tensor) -> Metrics:
    """Accuracies of predicted classes.

    Args:
        labels, best: [n] int64; the right and the preferred class.
        top: [n, k] int64, the k highest classes, best first: k = 5, or 1 for fewer than 5 classes.

    Returns:
        `acc1`, `acc5` (None for fewer than 5 classes) and `mean_per_class_recall` (over the classes that occur in the
        labels).
    """
    right = top == labels[:, None]
    samples = torch.bincount(labels).double()
    recalled = torch.bincount(labels[best == labels], minlength=len(samples)).double()
    present = samples > 0
    return {
        "acc1": int(right[:, 0].sum()) / len(labels),
        "acc5": int(right.sum()) / len(labels) if top.shape[1] == 5 else None,
        "mean_per_class_recall": float((recalled / samples)[present].mean()),
    }


def _predict(model: TaskModel, images: LabelledImages, heads: Sequence[Tensor]) -> Predictions:
    """The predictions of all ranks for all images, each encoded once."""
    share = model.together(lambda: _predict_share(model, images, heads))
    width = len(share.facts[0]) if len(share.facts) else 0
    rows = torch.cat([share.facts, share.best.double(), share.top.double()], dim=1) if width else torch.empty(0, 0)
    rows = gather_share(rows.double(), images.total, images.world_size)
    facts, best, top = rows.split([rows.shape[1] - len(heads) - _top(heads[0]), len(heads), _top(heads[0])], dim=1)
    return Predictions(facts, best.long(), top.long())


def _predict_share(model: TaskModel, images: LabelledImages, heads: Sequence[Tensor]) -> Predictions:
    facts, best, top, bad = [], [], [], []
    for batch in model.setting.loader(images):
        features = model.encode_images(batch["image"])
        bad.append(~torch.isfinite(features).all())
        with exact_float32(features.device):
            scores = [features @ head.T for head in heads]
        facts.append(batch["facts"])
        best.append(torch.stack([score.argmax(1) for score in scores], dim=1))
        top.append(scores[0].topk(_top(heads[0]), dim=1).indices)
    if not facts:
        return Predictions(torch.empty(0, 0), torch.empty(0, 0), torch.empty(0, 0))
    finite(torch.where(torch.stack(bad).any(), torch.nan, 0.0))
    return Predictions(torch.cat(facts), torch.cat(best).cpu(), torch.cat(top).cpu())


def _top(head: Tensor) -> int:
    return 5 if len(head) >= 5 else 1


def _encode(model: TaskModel, images: Share) -> Tensor:
    """Features of the images of all ranks in global order, [images.total, d] float32."""

    def share() -> Tensor:
        blocks = [model.encode_images(batch["image"]) for batch in model.setting.loader(images)]
        return finite(torch.cat(blocks) if blocks else torch.empty(0, 0, device=model.setting.device))

    return gather_share(model.together(share), images.total, images.world_size)


def _encode_texts(model: TaskModel, texts: Sequence[str]) -> Tensor:
    """Features of texts, shared over the ranks, [len(texts), d] float32."""
    setting = model.setting
    own = texts[setting.rank :: setting.world_size]
    rows = model.together(partial(_finite_texts, model, own))
    return gather_share(rows, len(texts), setting.world_size)


def _finite_texts(model: TaskModel, texts: Sequence[str]) -> Tensor:
    return finite(model.encode_texts(texts))
