"""Which runs belong together, what they are called, and what is told of them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from evaluation.comparison.groups import BOOKKEEPING, Group, final, group_runs, uneven, unfinished
from evaluation.comparison.runs import open_runs
from evaluation.errors import UserError
from training.params import parse_args

from .conftest import RunMaker


def grouped(logs: Path, *by: str) -> tuple[list[Group], list[str]]:
    return group_runs(open_runs([str(logs / "*")]), by)


def test_seeds_are_one_group(make_run: RunMaker, tmp_path: Path) -> None:
    offsets = (0.0, 0.03, 0.01)
    for seed, offset in enumerate(offsets):
        make_run(f"neuclip-s{seed}", offset, seed=seed, workers=seed, device="cpu")
    make_run("other", lr=0.5)
    [group, other], notes = grouped(tmp_path / "logs")
    assert (group.label, [run.name for run in group.runs]) == ("neuclip", ["neuclip-s0", "neuclip-s1", "neuclip-s2"])
    assert (other.label, len(other.runs)) == ("other", 1)
    assert notes == []
    found = final(group, "text_to_image_R@1")
    assert found is not None
    values = [0.2 + offset for offset in offsets]
    assert found == pytest.approx((statistics.fmean(values), statistics.stdev(values)))
    alone = final(other, "text_to_image_R@1")
    assert alone is not None
    assert alone.std is None


def test_a_metric_that_one_of_the_runs_lacks_has_no_mean(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a-0", seed=0, datacomp=True)
    make_run("a-1", seed=1)
    [group], _ = grouped(tmp_path / "logs")
    assert final(group, "DataComp Average") is None


def test_only_values_of_one_epoch_are_pooled(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a-0", seed=0, told=3, epochs=3, datacomp=True)
    make_run("a-1", 0.02, seed=1, told=1, epochs=3, datacomp=True)
    make_run("b", lr=0.5, told=3, epochs=3)
    metrics = ["text_to_image_R@1", "DataComp Average", "contrastive_loss", "lr"]
    groups, _ = grouped(tmp_path / "logs")
    values = {"text_to_image_R@1": 0.1, "DataComp Average": 0.2, "contrastive_loss": 3.6}
    for metric, first in values.items():
        found = final(groups[0], metric)
        assert found is not None
        assert found == pytest.approx((first + 0.01, statistics.stdev([0.0, 0.02])))
    assert uneven(groups, metrics) == [
        "text_to_image_R@1 of a is taken at epoch 1, the last of all; a-0 epoch 3.",
        "text_to_image_R@1 is not of one epoch: a epoch 1, b epoch 3.",
        "DataComp Average of a is taken at epoch 1, the last of all; a-0 epoch 3.",
        "contrastive_loss of a is taken at epoch 1, the last of all; a-0 epoch 3.",
        "contrastive_loss is not of one epoch: a epoch 1, b epoch 3.",
    ]


def test_runs_without_a_common_epoch_have_no_mean(make_run: RunMaker, tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = make_run(f"a-{seed}", seed=seed)
        results = folder / "results.jsonl"
        results.write_text(results.read_text().splitlines(keepends=True)[seed])
    [group], _ = grouped(tmp_path / "logs")
    assert final(group, "clip_val_loss") is None
    assert uneven([group], ["clip_val_loss"]) == [
        "clip_val_loss of a has no epoch in common; a-0 epoch 1, a-1 epoch 2."
    ]


def test_another_global_batch_is_no_second_seed(make_run: RunMaker, tmp_path: Path) -> None:
    """As many samples a process, but another number of processes, which params.txt does not tell."""
    for seed, batch in enumerate((8, 8, 32)):
        make_run(f"a-{seed}", seed=seed, batch=batch, batch_size=8)
    groups, _ = grouped(tmp_path / "logs")
    assert [[run.name for run in group.runs] for group in groups] == [["a-0", "a-1"], ["a-2"]]
    groups, notes = grouped(tmp_path / "logs", "global_batch")
    assert [(group.label, group.values) for group in groups] == [("global batch 8", (8,)), ("global batch 32", (32,))]
    assert notes == []
    assert grouped(tmp_path / "logs", "lr")[1] == [
        "besides lr the runs differ in global batch; none of them are pooled."
    ]


def test_groups_go_by_number_and_other_flags_are_told(make_run: RunMaker, tmp_path: Path) -> None:
    for value in (1000, 50, 500):
        make_run(f"r{value}", npn_restart_iter=value)
    groups, notes = grouped(tmp_path / "logs", "npn_restart_iter")
    assert [group.values for group in groups] == [(50,), (500,), (1000,)]
    assert groups[0].label == "npn_restart_iter 50"
    assert notes == []
    make_run("low", npn_restart_iter=500, lr=0.0001)
    groups, notes = grouped(tmp_path / "logs", "npn_restart_iter")
    assert [group.label for group in groups] == [
        *("npn_restart_iter 50", "npn_restart_iter 500 (low)", "npn_restart_iter 500 (r500)", "npn_restart_iter 1000"),
    ]
    assert [len(group.runs) for group in groups] == [1, 1, 1, 1]
    assert notes == ["besides npn_restart_iter the runs differ in lr; none of them are pooled."]


def test_a_flag_that_goes_with_the_other_is_told_too(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a", npn_restart_iter=1, lr=1.0)
    make_run("b", npn_restart_iter=2, lr=2.0)
    assert "differ in lr;" in grouped(tmp_path / "logs", "npn_restart_iter")[1][0]


def test_the_same_run_twice_is_no_second_seed(make_run: RunMaker, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(name)
    groups, notes = grouped(tmp_path / "logs")
    assert [len(group.runs) for group in groups] == [1, 1]
    assert notes == ["b: same flags and seed as another run; kept apart."]


def test_a_seed_can_be_asked_for(make_run: RunMaker, tmp_path: Path) -> None:
    for seed in (3, 1):
        make_run(f"a{seed}", seed=seed)
    assert [group.values for group in grouped(tmp_path / "logs", "seed")[0]] == [(1,), (3,)]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("x-s10", "x-s11"), "x"),
        (("b256-seed1", "b256-seed2"), "b256"),
        (("protos-1", "protos-2"), "protos"),
        (("x_b64_0", "x_b64_1"), "x_b64"),
        (("one", "two"), "one"),
        (("neuclip-b256", "neuclip-b256-s2"), "neuclip-b256"),
    ],
)
def test_a_group_has_what_its_names_share(
    names: tuple[str, str], label: str, make_run: RunMaker, tmp_path: Path
) -> None:
    for seed, name in enumerate(names):
        make_run(name, seed=seed)
    assert [group.label for group in grouped(tmp_path / "logs")[0]] == [label]


def test_labels_are_distinct(make_run: RunMaker, tmp_path: Path) -> None:
    for lr in (1.0, 2.0):
        for seed in (0, 1):
            make_run(f"x-{2 * int(lr) + seed}", lr=lr, seed=seed)
    assert [group.label for group in grouped(tmp_path / "logs")[0]] == ["x #1", "x #2"]


def test_unknown_flags_are_a_users_mistake(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a")
    with pytest.raises(UserError, match="did you mean npn_restart_iter"):
        grouped(tmp_path / "logs", "npn_restart")


def test_unfinished_runs_are_told(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a", told=1)
    make_run("b")
    make_run("c", epochs=4, stop_epochs=2)
    assert unfinished(open_runs([str(tmp_path / "logs" / "*")])) == ["a stands at epoch 1 of 2."]


def test_what_is_passed_over_are_flags_of_training() -> None:
    flags: dict[str, Any] = vars(parse_args(["--dataset-type", "synthetic"]))
    assert flags.keys() >= BOOKKEEPING
    # Each of these changes what a run learns.
    assert not BOOKKEEPING & {"lr", "precision", "batch_size", "epochs", "stop_epochs", "train_data", "npn_compile"}
