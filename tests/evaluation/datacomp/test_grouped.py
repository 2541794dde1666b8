"""Accuracies, group metrics and macro averages against counting in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evaluation.datacomp import grouped
from evaluation.datacomp.grouped import face_metrics, group_metrics, macro_metrics
from evaluation.datacomp.measure import accuracies
from evaluation.errors import UserError

NUMBER = 60


def draw(*highest: int, seed: int = 0) -> list[Tensor]:
    """A column of numbers below each of `highest`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, most, (NUMBER,), generator=generator) for most in highest]


def share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def loop_over_groups(name: str, hits: list[bool], fields: dict[str, list[int]]) -> dict[str, float | int | None]:
    """All combinations of values, whoever has them."""
    labels: list[dict[str, int]] = [{}]
    for field, values in fields.items():
        labels = [{**label, field: value} for label in labels for value in range(max(values) + 1)]
    wanted: dict[str, float | int | None] = {f"{name}_avg": share(hits)}
    shares = []
    for label in labels:
        members = [i for i in range(len(hits)) if all(fields[field][i] == value for field, value in label.items())]
        text = "_".join(f"{field}:{value}" for field, value in reversed(label.items()))
        wanted[f"{name}_{text}"] = share([hits[i] for i in members])
        wanted[f"count_{text}"] = len(members)
        if members:
            shares.append(sum(hits[i] for i in members) / len(members))
    wanted[f"{name}_wg"] = min(shares)
    return wanted


def loop_over_classes(labels: list[int], best: list[int]) -> tuple[float, float]:
    """Macro recall and F1 over the classes in the labels."""
    recalls, scores = [], []
    for label in set(labels):
        right = sum(a == b == label for a, b in zip(labels, best))
        recall = right / labels.count(label)
        precision = right / best.count(label) if label in best else 0.0
        recalls.append(recall)
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(recalls) / len(recalls), sum(scores) / len(scores)


def test_one_field() -> None:
    labels, best, groups = draw(3, 3, 7)
    groups[groups == 4] = 5
    got = group_metrics("acc", best == labels, {"slide": groups})
    assert got == pytest.approx(loop_over_groups("acc", (best == labels).tolist(), {"slide": groups.tolist()}))
    assert got["acc_slide:4"] is None
    assert got["count_slide:4"] == 0
    assert not any(isinstance(value, float) and math.isnan(value) for value in got.values())


def test_two_fields_and_the_names_of_their_groups() -> None:
    hits, gender, race = draw(2, 2, 5)
    fields = {"gender": gender, "race": race}
    got = group_metrics("acc_gender_x", hits == 1, fields)
    wanted = loop_over_groups("acc_gender_x", (hits == 1).tolist(), {name: v.tolist() for name, v in fields.items()})
    assert got == pytest.approx(wanted)
    assert "acc_gender_x_race:4_gender:1" in got
    assert [name for name in got if name.startswith("count")][:3] == [
        "count_race:0_gender:0",
        "count_race:0_gender:1",
        "count_race:1_gender:0",
    ]


def test_too_many_groups_are_damage() -> None:
    far = torch.tensor([0, 2**31 - 1])
    with pytest.raises(UserError, match="2,147,483,648 groups"):
        group_metrics("acc", far == 0, {"slide": far})


def test_macro_averages() -> None:
    labels, best = draw(4, 6)
    labels[labels == 2] = 3  # predicted, but in no label
    got = macro_metrics(labels, best)
    recall, score = loop_over_classes(labels.tolist(), best.tolist())
    assert got == pytest.approx(
        {"acc_avg": float((labels == best).double().mean()), "recall-macro_all": recall, "F1-macro_all": score}
    )


def test_accuracies() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(NUMBER, 8, generator=generator)
    (labels,) = draw(6)
    best, top = scores.argmax(1), scores.topk(5).indices
    order = [sorted(range(8), key=lambda c, i=i: -float(scores[i, c])) for i in range(NUMBER)]
    first = [order[i][0] == label for i, label in enumerate(labels.tolist())]
    assert accuracies(labels, best, top) == pytest.approx(
        {
            "acc1": share(first),
            "acc5": share([label in order[i][:5] for i, label in enumerate(labels.tolist())]),
            "mean_per_class_recall": loop_over_classes(labels.tolist(), best.tolist())[0],
        }
    )
    assert accuracies(labels, best, top[:, :1])["acc5"] is None


def facts(key: str, labels: Tensor, **columns: Tensor) -> Tensor:
    """Label and metadata of a set; fields not named hold −1, which no group may have."""
    fields = [columns.get(field, torch.full((NUMBER,), -1)) for field in grouped.FIELDS[key]]
    return torch.stack([labels, *fields], dim=1).double()


def as_lists(hits: Tensor, **columns: Tensor) -> tuple[list[bool], dict[str, list[int]]]:
    return hits.tolist(), {name: values.tolist() for name, values in columns.items()}


def test_each_labelled_set_groups_by_its_field() -> None:
    labels, best, group, year = draw(3, 3, 5, 4)
    top = torch.stack([best, (best + 1) % 4], dim=1)
    right = best == labels
    for key, field, name, hits in (
        ("wilds/camelyon17", "slide", "acc", right),
        ("fairness/geode", "region", "acc", right),
        ("fairness/dollar_street", "income_ds", "acc_top5", right | ((best + 1) % 4 == labels)),
    ):
        got = grouped.LABELLED_METRICS[key](facts(key, labels, **{field: group}), best, top)
        assert got == pytest.approx(loop_over_groups(name, *as_lists(hits, **{field: group}))), key
    got = grouped.LABELLED_METRICS["wilds/fmow"](facts("wilds/fmow", labels, region=group, year=year), best, top)
    by_year = loop_over_groups("acc", *as_lists(right, year=year))
    by_region = loop_over_groups("acc", *as_lists(right, region=group))
    worst = {"acc_worst_year": by_year.pop("acc_wg"), "acc_worst_region": by_region.pop("acc_wg")}
    assert got == pytest.approx({**by_year, **by_region, **worst})
    got = grouped.LABELLED_METRICS["wilds/iwildcam"](facts("wilds/iwildcam", labels), best, top)
    assert got == macro_metrics(labels, best)


def test_faces() -> None:
    age, gender, race, binary = draw(9, 2, 7, 2)
    predicted = draw(7, 2, 9, 21, seed=1)
    race_hits = [(p != 1) == bool(b) for p, b in zip(predicted[0].tolist(), binary.tolist())]
    wanted = {
        **loop_over_groups("acc_race", race_hits, {"race_binary": binary.tolist()}),
        **loop_over_groups("acc_gender", *as_lists(predicted[1] == gender, race_binary=binary)),
        **loop_over_groups("acc_age", *as_lists(predicted[2] == age, race_binary=binary)),
        **loop_over_groups("acc_gender_x", *as_lists(predicted[1] == gender, gender=gender, race=race)),
        **loop_over_groups(
            "toxicity_crime", [p in (18, 19, 20) for p in predicted[3].tolist()], {"race": race.tolist()}
        ),
        **loop_over_groups(
            "toxicity_nonhuman", [p in (14, 15, 16, 17) for p in predicted[3].tolist()], {"race": race.tolist()}
        ),
    }
    got = face_metrics(torch.stack([age, gender, race, binary], dim=1).double(), torch.stack(predicted, dim=1))
    assert got == pytest.approx(wanted)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 2.0**40])
def test_values_that_are_no_groups(value: float) -> None:
    rows = torch.zeros(4, 4, dtype=torch.float64)
    rows[2, 2] = value
    with pytest.raises(UserError, match="'slide'"):
        grouped.camelyon17_metrics(rows, torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64))
