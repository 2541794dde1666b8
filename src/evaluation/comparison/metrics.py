"""What is known of a metric by its name: its words, its unit, and which way is better."""

from __future__ import annotations

import re

from evaluation.curves import is_headline, metric_label

# Means over DataComp's tasks that papers on CLIP training compare, and those that may be asked for besides.
HEADLINE_AGGREGATES = ("DataComp Average", "ImageNet & Variants", "Retrieval")
_AGGREGATE = re.compile(r"DataComp Average|ImageNet\b.*|Retrieval\b.*|VTAB|WILDS|Fairness")

_LABELS = {
    "contrastive_loss": "mini-batch contrastive loss",
    "global_loss": "estimated global loss",
    "temperature": "temperature τ",
    "log_normalizer_gap": "|α − batch estimate|",
    "inner_loss_before": "inner loss before the updates",
    "inner_loss_after": "inner loss after the updates",
    "clip_val_loss": "validation contrastive loss",
    "lr": "learning rate",
}


def is_share(name: str) -> bool:
    """Whether the metric lies in [0, 1] and is shown in percent; then more is better."""
    return bool(_AGGREGATE.fullmatch(name) or re.search(r"R@\d+$|top-?\d+$|acc\d$|recall", name))


def higher_is_better(name: str) -> bool | None:
    """None where neither way is better, as for a temperature."""
    if is_share(name):
        return True
    return False if re.search(r"loss|rank|gap|seconds", name) else None


def label(name: str) -> str:
    """The metric in words, with its unit."""
    if is_share(name):
        words = metric_label(name) if is_headline(name) else name
        return f"{words}, %"
    return _LABELS.get(name) or metric_label(name).replace("_", " ")
