"""Which tasks a mean is of, and what it is while some are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.datacomp.aggregate import GROUPS, aggregates, at_hand, main_metrics, summary_lines, write_summary
from evaluation.datacomp.results import Identity, ResultsFile, read_results
from evaluation.datacomp.selection import selected_tasks
from evaluation.datacomp.tasks import TASKS
from evaluation.errors import UserError

VALUES = {key: (1 + number) / 64 for number, key in enumerate(GROUPS["DataComp Average"])}


def test_groups_have_the_published_sizes() -> None:
    assert {name: len(keys) for name, keys in GROUPS.items()} == {
        "DataComp Average": 38,
        "ImageNet": 1,
        "ImageNet & Variants": 7,
        "Retrieval": 2,
        "Retrieval with WinoGAViL": 3,
        "ImageNet dist. shifts": 6,
        "VTAB": 13,
        "WILDS": 3,
        "Fairness": 2,
    }
    assert all(TASKS[key].main_metric for keys in GROUPS.values() for key in keys)
    assert "sun397" in GROUPS["VTAB"]


def test_means_of_all_tasks() -> None:
    found = aggregates(VALUES)
    for name, keys in GROUPS.items():
        total = 0.0
        for key in keys:
            total += VALUES[key]
        assert found[name].value == pytest.approx(total / len(keys), abs=1e-12)
        assert found[name].missing == ()


def test_an_incomplete_group_has_no_value(tmp_path: Path) -> None:
    values = {key: value for key, value in VALUES.items() if key != "objectnet"}
    found = aggregates(values)
    assert found["ImageNet & Variants"].value is None
    assert found["ImageNet & Variants"].missing == ("objectnet",)
    assert found["Retrieval"].value is not None
    assert at_hand(values) == {"value": pytest.approx(sum(values.values()) / 37), "tasks": 37, "of": 38}
    lines = [{"key": key, "metrics": {"main_metric": value}} for key, value in values.items()]
    lines += [
        {"key": "objectnet", "metrics": {"main_metric": None}},
        {"key": "fairness/utkface", "metrics": {"main_metric": 0.5}},
        {"key": "another/set", "metrics": {"main_metric": 0.5}},
    ]
    assert main_metrics(lines) == values
    path = tmp_path / "eval_results" / "epoch_1_summary.json"
    write_summary(path, lines, {"run": "r"})
    summary = json.loads(path.read_text())
    assert summary["aggregates"]["DataComp Average"]["missing"] == ["objectnet"]
    assert summary["main_metrics"]["objectnet"] is None
    assert summary["mean_of_the_tasks_at_hand"]["tasks"] == 37
    text = "\n".join(summary_lines(found, values))
    assert "ImageNet dist. shifts            –  (missing 1 of 6 tasks)" in text
    assert "mean of the 37 of 38 tasks at hand" in text
    assert at_hand({})["value"] is None


def test_selection() -> None:
    assert len(selected_tasks(None)) == len(selected_tasks("all")) == 40
    for words, keys in {
        "vtab": set(GROUPS["VTAB"]),
        "imagenet-variants": set(GROUPS["ImageNet & Variants"]),
        "dist-shifts": set(GROUPS["ImageNet dist. shifts"]),
        "Retrieval": set(GROUPS["Retrieval"]),
        "retrieval-with-winogavil": set(GROUPS["Retrieval with WinoGAViL"]),
        "ImageNet": {"imagenet1k"},
        "imagenet-a,Describable Textures, fmow": {"imagenet-a", "vtab/dtd", "wilds/fmow"},
        "fairness": {key for key in TASKS if key.startswith("fairness/")},
        "misc/winogavil": {"misc/winogavil"},
    }.items():
        assert {task.key for task in selected_tasks(words)} == keys, words
    for name, group in GROUPS.items():
        # The faces have no main metric; as a group of tasks they belong to fairness.
        wanted = {key for key in TASKS if key.startswith("fairness/")} if name == "Fairness" else set(group)
        assert {task.key for task in selected_tasks(name)} == wanted, name
    for words in ("imagenet2", ",", ""):
        with pytest.raises(UserError, match="--tasks"):
            selected_tasks(words)


def test_the_file_stays_whole_whatever_was_in_it(tmp_path: Path) -> None:
    path = tmp_path / "epoch_1_eval_results.jsonl"
    mine = {"key": "mnist", "metrics": {"main_metric": 0.5}, "checkpoint_sha256": "a" * 64, "model": {"model": "m"}}
    path.write_text(
        "\n".join(
            [json.dumps(mine), "[1]", "\x00\x00", json.dumps({**mine, "model": {"model": "n"}}), json.dumps(mine)]
        )
    )
    file = ResultsFile(path, Identity("a" * 64, {"model": "m"}))
    opened = file.open()
    assert list(opened.lines) == ["mnist"]
    assert len(opened.told) == 3
    assert path.read_text() == json.dumps(mine) + "\n"
    assert read_results(path.with_name("epoch_1_eval_results.other-model.jsonl"))[0]["model"] == {"model": "n"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.record({"key": "cifar10", "metrics": {"acc1": float("nan")}})
    assert path.read_text() == json.dumps(mine) + "\n"
