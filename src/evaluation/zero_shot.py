"""Zero-shot classification: a classifier head made of prompts, and its accuracies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.collectives import all_reduce_sum, exact_float32
from evaluation.errors import UserError
from evaluation.retrieval import TIE_TOLERANCE

Template = str | Callable[[str], str]


def fill_template(template: Template, class_name: str) -> str:
    """The prompt of a class: a template is a function of the name, or a string with {c} in the name's place.

    Raises:
        UserError: if a string template has no {c}.
    """
    if callable(template):
        return template(class_name)
    if "{c}" not in template:
        raise UserError(f"template {template!r} has no {{c}}; write {{c}} where the class name belongs.")
    return template.replace("{c}", class_name)


@torch.no_grad()
def build_class_head(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[Template],
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """A classifier from class names: all prompts of a class are encoded, each normalised, averaged, normalised again.

    Args:
        encode_text: tokens [B, context_length] int64 on `device` → embeddings [B, d], of any float dtype.
        tokenizer: list of B strings → tokens [B, context_length].
        class_names: C names.
        templates: T functions of a name, or strings with {c}.
        device: where the tokens are put.
        batch_size: most prompts encoded at a time.

    Returns:
        [C, d] float32, L2-normalised.

    Raises:
        ValueError: without class names or templates, for a batch size below 1.
        UserError: for a string template without {c}.
    """
    if not class_names or not templates or batch_size < 1:
        sizes = f"{len(class_names)} class names, {len(templates)} templates, batch_size {batch_size}"
        raise ValueError(f"zero-shot head: got {sizes}; each must be at least 1.")
    head = []
    group = max(1, batch_size // len(templates))  # whole classes at a time, so that only their prompts are held
    for start in range(0, len(class_names), group):
        names = class_names[start : start + group]
        prompts = [fill_template(template, name) for name in names for template in templates]
        chunks = [
            encode_text(tokenizer(prompts[i : i + batch_size]).to(device)).float()
            for i in range(0, len(prompts), batch_size)
        ]
        features = F.normalize(torch.cat(chunks), dim=-1).view(len(names), len(templates), -1)
        head.append(F.normalize(features.mean(1), dim=-1))
    return torch.cat(head)


@torch.no_grad()
def zero_shot_metrics(
    image_features: Tensor,
    labels: Tensor,
    head: Tensor,
    *,
    world_size: int = 1,
    block: int = 4096,
) -> dict[str, float | None]:
    """Accuracies of a class head, ties counted as random tie breaking would on average.

    Every rank passes its own share of the samples (shares may differ, and be empty); counts are summed over the ranks.

    Args:
        image_features: [n, d] float32, L2-normalised: the samples of this rank.
        labels: [n] int64 in 0 … C−1.
        head: [C, d] float32, L2-normalised, the same on every rank.
        world_size: number of ranks of the default process group (gloo or nccl).
        block: images scored at a time.

    Returns:
        `top1`, `top5` (None under 5 classes) and `mean_per_class_recall` (mean over the classes that occur in the labels
        of the top-1 recall), in 0 … 1. The same on every rank.

    Raises:
        UserError: for a label outside 0 … C−1, features that are not finite, or no sample on any rank.
    """
    number = len(head)
    problem = _problem(image_features, labels, head)
    # [3, C] float64: samples, expected top-1 hits and expected top-5 hits of each class. One more column carries whether
    # any rank saw a problem, so that all ranks raise and none waits for the others.
    totals = torch.zeros(3, number + 1, dtype=torch.float64)
    totals[0, number] = float(bool(problem))
    if not problem:
        for start in range(0, len(labels), block):
            rows = slice(start, start + block)
            totals[:, :number] += _class_totals(image_features[rows], labels[rows], head)
    totals = all_reduce_sum(totals, world_size)
    if totals[0, number] > 0:
        raise UserError(problem or "zero-shot: another rank has bad samples; its message says which.")
    samples, top1, top5 = totals[:, :number]
    if not samples.sum() > 0:
        raise UserError("zero-shot: there is no sample to classify; check the path of the classification set.")
    present = samples > 0
    return {
        "top1": float(top1.sum() / samples.sum()),
        "top5": float(top5.sum() / samples.sum()) if number >= 5 else None,
        "mean_per_class_recall": float((top1[present] / samples[present]).mean()),
    }


def chance_metrics(number_of_classes: int) -> dict[str, float | None]:
    """What guessing scores in every metric of `zero_shot_metrics`: 1/C, 5/C (None under 5 classes) and 1/C."""
    top5 = 5 / number_of_classes if number_of_classes >= 5 else None
    return {"top1": 1 / number_of_classes, "top5": top5, "mean_per_class_recall": 1 / number_of_classes}


def _problem(image_features: Tensor, labels: Tensor, head: Tensor) -> str:
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(head)):
        seen = f"{int(labels.min())} … {int(labels.max())}"
        return f"zero-shot: labels {seen} do not fit {len(head)} class names; check classnames.txt against the labels."
    if not bool(torch.isfinite(image_features).all()) or not bool(torch.isfinite(head).all()):
        return "zero-shot: features are not finite: the model has diverged, evaluate an earlier checkpoint."
    return ""


def _class_totals(features: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """[3, C] float64 on the CPU: per class the samples, and the expected top-1 and top-5 hits, of one block."""
    labels = labels.to(features.device)
    with exact_float32(features.device):
        scores = features @ head.to(features.device).T
    difference = scores - scores.gather(1, labels[:, None])
    higher = (difference > TIE_TOLERANCE).sum(1).cpu().to(torch.float64)
    tied = (difference.abs() <= TIE_TOLERANCE).sum(1).cpu().to(torch.float64)
    totals = torch.zeros(3, len(head), dtype=torch.float64)
    for row, share in enumerate((torch.ones_like(tied), *(((k - higher) / tied).clamp(0, 1) for k in (1, 5)))):
        totals[row].index_add_(0, labels.cpu(), share)
    return totals
