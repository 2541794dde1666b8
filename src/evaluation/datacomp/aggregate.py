"""Means over groups of DataComp's tasks, of their main metrics.

The groups are those of `aggregate_scores.py` beside DataComp's evaluation code, and those of papers on CLIP training where
they read a name differently: there Retrieval is Flickr30k and MSCOCO, and ImageNet & Variants is ImageNet with six shifts of
it; the script counts WinoGAViL as retrieval, and the six shifts without ImageNet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.datacomp.tasks import TASKS
from evaluation.whole_files import write_whole

AVERAGE = "DataComp Average"

_SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
_RETRIEVAL = ("retrieval/flickr_1k_test_image_text_retrieval", "retrieval/mscoco_2014_5k_test_image_text_retrieval")

# name → keys of its tasks, in the order of tables
GROUPS: dict[str, tuple[str, ...]] = {
    AVERAGE: tuple(key for key, task in TASKS.items() if task.main_metric is not None),
    "ImageNet": ("imagenet1k",),
    "ImageNet & Variants": ("imagenet1k", *_SHIFTS),
    "Retrieval": _RETRIEVAL,
    "Retrieval with WinoGAViL": (*_RETRIEVAL, "misc/winogavil"),
    "ImageNet dist. shifts": _SHIFTS,
    "VTAB": tuple(key for key in TASKS if key.startswith("vtab/") or key == "sun397"),
    "WILDS": tuple(key for key in TASKS if key.startswith("wilds/")),
    "Fairness": tuple(key for key, task in TASKS.items() if key.startswith("fairness/") and task.main_metric),
}


class Aggregate(NamedTuple):
    """value: the mean of the group's main metrics, None while one is missing; tasks: keys; missing: those without a value."""

    value: float | None
    tasks: tuple[str, ...]
    missing: tuple[str, ...]


def main_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Key → main metric of the lines of a results file, of DataComp's tasks that have one."""
    found = {}
    for line in lines:
        key, value = line["key"], line["metrics"].get("main_metric")
        if key in TASKS and TASKS[key].main_metric is not None and _is_number(value):
            found[key] = float(value)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def aggregates(values: Mapping[str, float]) -> dict[str, Aggregate]:
    """The groups' means from key → main metric; a group with a missing task has the value None."""
    found = {}
    for name, keys in GROUPS.items():
        missing = tuple(key for key in keys if key not in values)
        value = None if missing else math.fsum(values[key] for key in keys) / len(keys)
        found[name] = Aggregate(value, keys, missing)
    return found


def at_hand(values: Mapping[str, float]) -> dict[str, Any]:
    """The mean of the tasks that there are: `value` (None without any), `tasks` (how many), `of` (38)."""
    known = [values[key] for key in GROUPS[AVERAGE] if key in values]
    return {"value": math.fsum(known) / len(known) if known else None, "tasks": len(known), "of": len(GROUPS[AVERAGE])}


def write_summary(path: Path, lines: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Aggregate]:
    """Write the aggregates of a results file's lines beside it.

    Args:
        path: the file, epoch_N_summary.json.
        lines: of one checkpoint.
        facts: what else the file says: the run, the checkpoint.

    Returns:
        The aggregates.

    Raises:
        OSError: the file cannot be written.
    """
    lines = list(lines)
    values = main_metrics(lines)
    found = aggregates(values)
    content = {
        **facts,
        "aggregates": {name: aggregate._asdict() for name, aggregate in found.items()},
        "mean_of_the_tasks_at_hand": at_hand(values),
        "main_metrics": {key: values.get(key) for key in GROUPS[AVERAGE]},
        "images": {line["key"]: line.get("images") for line in lines},
        "precision": sorted({str(line.get("precision")) for line in lines}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return found


def summary_lines(found: Mapping[str, Aggregate], values: Mapping[str, float]) -> list[str]:
    """The aggregates in words, in percent, for a terminal."""
    width = max(map(len, found))
    lines = []
    for name, (value, keys, missing) in found.items():
        if value is not None:
            lines.append(f"{name:<{width}}  {100 * value:6.2f} %  ({_tasks(len(keys))})")
        else:
            lines.append(f"{name:<{width}}  {'–':>8}  (missing {len(missing)} of {_tasks(len(keys))})")
    hand = at_hand(values)
    if hand["value"] is not None and hand["tasks"] < hand["of"]:
        lines.append(f"mean of the {hand['tasks']} of {hand['of']} tasks at hand: {100 * hand['value']:.2f} %")
    return lines


def _tasks(number: int) -> str:
    return f"{number} tasks" if number != 1 else "1 task"
