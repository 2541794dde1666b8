"""Opening run folders: what they tell, patterns, and what is wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.comparison.runs import open_runs
from evaluation.errors import UserError

from .conftest import RunMaker


def test_metrics_over_samples_steps_and_epochs(make_run: RunMaker) -> None:
    [run] = open_runs([str(make_run("a", datacomp=True))])
    assert run.points("contrastive_loss", "samples")[0] == [8, 160, 320, 328, 480, 640]
    assert run.points("contrastive_loss", "epoch")[0][-1] == 2
    for x, places in (("samples", [320, 640]), ("step", [40, 80]), ("epoch", [1, 2])):
        xs, values = run.points("text_to_image_R@1", x)
        assert (xs, values) == (pytest.approx(places), pytest.approx([0.1, 0.2]))
        assert run.points("DataComp Average", x) == (pytest.approx(places), pytest.approx([0.2, 0.4]))
    assert run.points("Retrieval", "samples") == ([], [])
    assert run.points("nothing", "samples") == ([], [])
    assert (run.reached, run.planned) == (2, 2)


def test_a_killed_run_and_one_whose_last_lines_are_missing(make_run: RunMaker) -> None:
    folder = make_run("a")
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:4]) + '{"step": 60, "contra')
    [run] = open_runs([str(folder)])
    assert run.points("contrastive_loss", "step")[0] == [1, 20, 40, 41]
    # 8 samples a step to the end.
    assert run.points("text_to_image_R@1", "samples")[0] == pytest.approx([320, 640])


def test_patterns_pass_over_what_is_no_run(make_run: RunMaker, tmp_path: Path) -> None:
    for name in ("n-s10", "n-s2", "other"):
        make_run(name)
    (tmp_path / "logs" / "n-notes").mkdir()
    logs = tmp_path / "logs"
    runs = open_runs([str(logs / "other"), str(logs / "n-*"), str(logs / "*")])
    assert [run.name for run in runs] == ["other", "n-s2", "n-s10"]


def test_runs_of_one_name_go_by_their_paths(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a")
    (tmp_path / "logs" / "a").rename(tmp_path / "a")
    make_run("a")
    names = [run.name for run in open_runs([str(tmp_path / "a"), str(tmp_path / "logs" / "a")])]
    assert names == [str(tmp_path / "a"), str(tmp_path / "logs" / "a")]


def _no_lines(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    (folder / "results.jsonl").unlink()
    shutil.rmtree(folder / "eval_results")


def _broken_summary(folder: Path) -> None:
    (folder / "eval_results" / "epoch_1_summary.json").write_text('{"aggreg')


def _other_summary(folder: Path) -> None:
    (folder / "eval_results" / "epoch_1_summary.json").write_text(json.dumps({"aggregates": {"VTAB": 0.5}}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "params.txt").unlink(), "params.txt is missing"),
        (lambda folder: (folder / "params.txt").write_bytes(b"\xff\xfe\x00"), "params.txt cannot be read"),
        (_no_lines, "has told nothing yet"),
        (_broken_summary, "epoch_1_summary.json cannot be read"),
        (_other_summary, "epoch_1_summary.json cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(damage: Callable[[Path], object], words: str, make_run: RunMaker) -> None:
    folder = make_run("a", datacomp=True)
    damage(folder)
    with pytest.raises(UserError, match=words) as raised:
        open_runs([str(folder)])
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_runs([str(tmp_path / "none")])
    with pytest.raises(UserError, match="no run folder"):
        open_runs([str(tmp_path / "none*")])


def test_a_run_without_samples_is_drawn_over_epochs(make_run: RunMaker) -> None:
    folder = make_run("a")
    (folder / "metrics.jsonl").unlink()
    [run] = open_runs([str(folder)])
    assert run.points("text_to_image_R@1", "epoch")[0] == [1, 2]
    with pytest.raises(UserError, match="--x epoch"):
        run.points("text_to_image_R@1", "samples")
