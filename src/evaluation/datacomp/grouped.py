"""Accuracies as a whole and by group, with the names of WILDS 2.0 (Koh et al., 2021) and its rules.

All functions take columns of n samples in global order and return plain numbers. A group is a combination of metadata
values from 0 to the highest that occurs; the metric of an empty group is None, and the worst group is one with samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from evaluation.datacomp.labelled import column
from evaluation.errors import UserError

Metrics = dict[str, float | int | None]

# The metadata vectors of the published sets.
FIELDS: dict[str, tuple[str, ...]] = {
    "wilds/iwildcam": ("location", "sequence", "year", "month", "day", "hour", "minute", "second", "y"),
    "wilds/camelyon17": ("hospital", "slide", "y"),
    "wilds/fmow": ("region", "year", "y"),
    "fairness/dollar_street": ("income_ds", "income_meta", "region"),
    "fairness/geode": ("region", "country"),
    "fairness/fairface": ("age", "gender", "race", "race_binary"),
    "fairness/utkface": ("age", "gender", "race", "race_binary"),
}

# The objectives of the face sets, in the order of the columns of their predictions.
OBJECTIVES = ("race", "gender", "age", "toxic")
WHITE = 1  # the index among the race names
NON_HUMAN = range(14, 18)  # the indices among the names of the toxicity objective; from 18 on they are crimes
MOST_GROUPS = 1_000_000


def group_metrics(name: str, hits: Tensor, groups: Mapping[str, Tensor], worst: str | None = None) -> Metrics:
    """A share of hits, overall and in every group.

    Args:
        name: what the metric is called.
        hits: [n] bool.
        groups: field → its values [n] int64, from 0. The first field changes fastest from group to group and stands last
            in the group's name.
        worst: name of the worst group's metric; None for `{name}_wg`.

    Returns:
        `{name}_avg`, for every group `{name}_{field}:{value}` (several fields joined by `_`) and `count_{field}:{value}`,
        and the lowest share of a group that has samples.

    Raises:
        UserError: for more groups than can be meant.
    """
    sizes = [int(values.max()) + 1 for values in groups.values()]
    number = 1
    index = torch.zeros(len(hits), dtype=torch.int64)
    for size, values in zip(sizes, groups.values()):
        index += number * values
        number *= size
    if number > MOST_GROUPS:
        raise UserError(f"metadata fields {', '.join(groups)} make {number:,} groups; fetch the set again.")
    counts = torch.bincount(index, minlength=number).tolist()
    right = torch.bincount(index[hits], minlength=number).tolist()
    metrics: Metrics = {f"{name}_avg": int(hits.sum()) / len(hits)}
    lowest = 1.0
    for group, (count, good) in enumerate(zip(counts, right)):
        label = _group_label(group, list(groups), sizes)
        metrics[f"{name}_{label}"] = good / count if count else None
        metrics[f"count_{label}"] = count
        lowest = min(lowest, good / count) if count else lowest
    metrics[worst or f"{name}_wg"] = lowest
    return metrics


def _group_label(group: int, fields: Sequence[str], sizes: Sequence[int]) -> str:
    parts = []
    for field, size in zip(fields, sizes):
        parts.append(f"{field}:{group % size}")
        group //= size
    return "_".join(reversed(parts))


def macro_metrics(labels: Tensor, predicted: Tensor) -> Metrics:
    """Accuracy, recall and F1, the latter two averaged over the classes that occur in the labels.

    Args:
        labels, predicted: [n] int64.

    Returns:
        `acc_avg`, `recall-macro_all` and `F1-macro_all`.
    """
    number = int(torch.maximum(labels.max(), predicted.max())) + 1
    wanted = torch.bincount(labels, minlength=number).double()
    given = torch.bincount(predicted, minlength=number).double()
    right = torch.bincount(labels[labels == predicted], minlength=number).double()
    present = wanted > 0
    return {
        "acc_avg": float(right.sum() / len(labels)),
        "recall-macro_all": float((right / wanted)[present].mean()),
        "F1-macro_all": float((2 * right / (wanted + given))[present].mean()),
    }


def iwildcam_metrics(facts: Tensor, best: Tensor, top: Tensor) -> Metrics:
    """`macro_metrics` of the facts (label and metadata) and the predictions; see `LABELLED_METRICS`."""
    return macro_metrics(facts[:, 0].long(), best)


def camelyon17_metrics(facts: Tensor, best: Tensor, top: Tensor) -> Metrics:
    """Accuracy by slide."""
    return group_metrics("acc", best == facts[:, 0].long(), {"slide": column(facts, 2, "slide")})


def fmow_metrics(facts: Tensor, best: Tensor, top: Tensor) -> Metrics:
    """Accuracy by year and by region. The worst region is the lowest of all that have samples, "Other" included."""
    hits = best == facts[:, 0].long()
    by_year = group_metrics("acc", hits, {"year": column(facts, 2, "year")}, "acc_worst_year")
    by_region = group_metrics("acc", hits, {"region": column(facts, 1, "region")}, "acc_worst_region")
    return {**by_year, **by_region}


def dollar_street_metrics(facts: Tensor, best: Tensor, top: Tensor) -> Metrics:
    """Top-5 accuracy by income group."""
    hits = (top == facts[:, :1].long()).any(1)
    return group_metrics("acc_top5", hits, {"income_ds": column(facts, 1, "income_ds")})


def geode_metrics(facts: Tensor, best: Tensor, top: Tensor) -> Metrics:
    """Accuracy by region."""
    return group_metrics("acc", best == facts[:, 0].long(), {"region": column(facts, 1, "region")})


# Task key → function of facts [n, 1 + fields] float64 (label first), predicted classes [n] int64 and the five (or fewer)
# highest classes [n, k] int64.
LABELLED_METRICS: dict[str, Callable[[Tensor, Tensor, Tensor], Metrics]] = {
    "wilds/iwildcam": iwildcam_metrics,
    "wilds/camelyon17": camelyon17_metrics,
    "wilds/fmow": fmow_metrics,
    "fairness/dollar_street": dollar_street_metrics,
    "fairness/geode": geode_metrics,
}


def face_metrics(facts: Tensor, best: Tensor) -> Metrics:
    """The metrics of FairFace and UTKFace, as tables 3 to 6 of the CLIP paper's section on bias have them.

    Race counts as right when being predicted white or not agrees with `race_binary` (0 is white there).

    Args:
        facts: [n, 4] float64: age, gender, race, race_binary.
        best: [n, 4] int64: the predicted class of every one of `OBJECTIVES`.

    Returns:
        `acc_race_…`, `acc_gender_…` and `acc_age_…` by race_binary, `acc_gender_x_…` by race and gender,
        `toxicity_crime_…` and `toxicity_nonhuman_…` (shares of images put into such a class) by race.
    """
    age, gender, race, binary = (column(facts, place, name) for place, name in enumerate(FIELDS["fairness/fairface"]))
    predicted = dict(zip(OBJECTIVES, best.unbind(1)))
    toxic = predicted["toxic"]
    return {
        **group_metrics("acc_race", (predicted["race"] != WHITE).long() == binary, {"race_binary": binary}),
        **group_metrics("acc_gender", predicted["gender"] == gender, {"race_binary": binary}),
        **group_metrics("acc_age", predicted["age"] == age, {"race_binary": binary}),
        **group_metrics("acc_gender_x", predicted["gender"] == gender, {"gender": gender, "race": race}),
        **group_metrics("toxicity_crime", toxic >= NON_HUMAN.stop, {"race": race}),
        **group_metrics("toxicity_nonhuman", (toxic >= NON_HUMAN.start) & (toxic < NON_HUMAN.stop), {"race": race}),
    }
