"""compare.py over made-up run folders: seeds, aggregates, held-out metrics, and what must not be mixed."""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.compare import main
from evaluation.comparison.evaluated import name_without_seed
from evaluation.datacomp.aggregate import GROUPS

SRC = Path(__file__).resolve().parents[3] / "src"
TASKS = GROUPS["DataComp Average"]
Add = Callable[..., Path]


def write_datacomp(folder: Path, scores: dict[str, float], epoch: int = 3, **more: Any) -> None:
    path = folder / "eval_results" / f"epoch_{epoch}_eval_results.jsonl"
    path.parent.mkdir(exist_ok=True)
    facts = {"checkpoint_sha256": "a" * 64, "precision": "fp32", "images": 100, **more}
    lines = [{"key": key, "dataset": key, "metrics": {"main_metric": score}, **facts} for key, score in scores.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_held_out(
    folder: Path, recall: float, pairs: int = 500, epoch: int | None = 3, iteration: int | None = None, **more: Any
) -> None:
    metrics = {"retrieval/image_to_text_R@1": recall, "retrieval/image_to_text_mean_rank": 100 * (1 - recall)}
    content = {
        "metrics": metrics,
        "counts": {"pairs": pairs, "distinct_captions": pairs},
        "checkpoint": {"epoch": epoch, "iteration": iteration},
        **more,
    }
    (folder / "evaluation.json").write_text(json.dumps(content))


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """add(name, seed, **params): a run's folder with its params.txt."""

    def make(name: str, seed: int = 0, **params: Any) -> Path:
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        lines = {"name": name, "seed": seed, "objective": "openclip", "lr": 1e-3, "workers": seed, **params}
        (folder / "params.txt").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        return folder

    return make


def table(tmp_path: Path) -> dict[str, dict[str, str]]:
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_seeds_are_one_row_with_mean_and_sample_deviation(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recalls = (0.40, 0.42, 0.47)
    for seed, recall in enumerate(recalls):
        folder = add(f"neuclip-seed{seed}", seed, objective="neuclip")
        write_held_out(folder, recall)
        write_datacomp(folder, dict.fromkeys(TASKS, 0.3 + 0.01 * seed))
    alone = add("openclip", 0)
    write_held_out(alone, 0.41)
    write_datacomp(alone, dict.fromkeys(TASKS, 0.33))
    logs = tmp_path / "logs"
    assert main([f"{logs}/neuclip-seed*", str(alone), "--out", str(tmp_path / "out")]) == 0
    rows = table(tmp_path)
    assert list(rows) == ["neuclip", "openclip"]
    key = "retrieval/image_to_text_R@1"
    assert float(rows["neuclip"][key]) == pytest.approx(statistics.fmean(recalls))
    assert float(rows["neuclip"][f"{key}_std"]) == pytest.approx(statistics.stdev(recalls))
    assert rows["openclip"][f"{key}_std"] == ""
    assert float(rows["neuclip"]["DataComp Average"]) == pytest.approx(0.31)
    assert float(rows["openclip"]["VTAB"]) == pytest.approx(0.33)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| **43.00 ± 3.61** |" in page  # the mean rank has no column unless asked for
    assert "mean rank" not in page
    assert re.search(r"\| neuclip \| 3 \| 31\.00 ± 1\.00 \|", page)
    assert "| openclip | 1 | **33.00** |" in page
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    assert r"\textbf{43.00 $\pm$ 3.61}" in latex
    assert r"ImageNet \& Variants, \%" in latex
    assert latex.count(r"\\") == 3
    out = capsys.readouterr().out
    assert "[43.00 ± 3.61]" in out
    assert "all evaluated after epoch 3, fp32" in out


def test_lower_ranks_are_better_and_tasks_have_columns(add: Add, tmp_path: Path) -> None:
    for number, name in enumerate(("worse", "better")):
        folder = add(name, lr=number)
        write_held_out(folder, 0.1 + 0.1 * number)
        write_datacomp(folder, {key: (i + number) / 50 for i, key in enumerate(TASKS)})
    flags = ["--tasks", "--metrics", "retrieval/image_to_text_mean_rank", "--out", str(tmp_path / "out")]
    assert main([f"{tmp_path}/logs/*", *flags]) == 0
    rows = table(tmp_path)
    assert float(rows["better"]["vtab/caltech101"]) == pytest.approx(0.02)
    assert "| **80.00** |" in (tmp_path / "out" / "comparison.md").read_text()
    assert sum(key in rows["better"] for key in TASKS) == 38


def test_incomplete_aggregates_are_marked_and_compared_on_what_all_have(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {key: i / 50 for i, key in enumerate(TASKS)}
    write_datacomp(add("whole"), scores)
    write_datacomp(
        add("part", lr=1), {key: value for key, value in scores.items() if key not in ("objectnet", "mnist")}
    )
    assert main([f"{tmp_path}/logs/*", "--out", str(tmp_path / "out")]) == 0
    rows = table(tmp_path)
    assert rows["part"]["DataComp Average"] == ""
    assert rows["part"]["ImageNet & Variants"] == ""
    assert rows["part"]["VTAB"] == rows["whole"]["VTAB"]
    common = "mean of the 36 tasks that all have"
    expected = statistics.fmean(value for key, value in scores.items() if key not in ("objectnet", "mnist"))
    assert float(rows["part"][common]) == pytest.approx(expected)
    assert float(rows["whole"][common]) == pytest.approx(expected)
    out = capsys.readouterr().out
    assert "part: DataComp Average is incomplete, without mnist, objectnet" in out
    # No best of one.
    assert "**75" not in (tmp_path / "out" / "comparison.md").read_text()


def test_different_data_are_never_averaged_and_are_marked_between_rows(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = add("a-seed0", 0), add("a-seed1", 1)
    write_held_out(a, 0.4, pairs=500)
    write_held_out(b, 0.6, pairs=400)
    assert main([str(a), str(b)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a-seed0 and a-seed1 would be averaged, but image → text R@1 comes from different data" in error
    (b / "params.txt").write_text("objective: neuclip\n")
    assert main([str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "* image → text R@1: not of the same data in all rows, so none is best" in out
    assert "**" not in (tmp_path / "out" / "comparison.md").read_text()


def test_a_row_that_lacks_a_run_says_so(add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1, 1):
        folder = add(f"a-seed{seed}-{len(list(tmp_path.rglob('params.txt')))}", seed)
        write_datacomp(folder, {"mnist": 0.5}, precision="bf16" if seed else "fp32")
    write_held_out(folder, 0.5)
    assert main([f"{tmp_path}/logs/*"]) == 0
    out = capsys.readouterr().out
    assert "image → text R@1 is of 1 of its 3 runs" in out
    assert "some of its 3 runs have the same seed" in out
    assert "evaluated after epoch 3, bf16: " in out


def test_grouping_by_objective_tells_what_else_differs(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        write_held_out(add(f"x{number}", number, lr=number), 0.5)
    assert main([f"{tmp_path}/logs/*", "--group-by", "objective"]) == 0
    assert "openclip: its runs also differ in lr" in capsys.readouterr().out
    names = {
        "neuclip-seed3-b256": "neuclip-b256",
        "a_s1": "a",
        "seed12": "seed12",
        "vits14": "vits14",
        "run.seed=2": "run",
        "run_s=2": "run",
        "ViT-S-16-seed1": "ViT-S-16",
        "ViT-S-32-seed1": "ViT-S-32",
    }
    assert {name: name_without_seed(name) for name in names} == names


def test_epochs_and_results_of_the_public_code(add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add("a")
    write_datacomp(folder, {"imagenet1k": 0.3}, epoch=9)
    path = folder / "eval_results" / "epoch_10_eval_results.jsonl"
    path.write_text(
        '{"key": "imagenet1k", "dataset": "ImageNet 1k", "metrics": {"acc1": 0.4, "main_metric": 0.4}}\n{"key'
    )
    write_held_out(folder, 0.5, epoch=9)
    for flags, value in (([], 0.4), (["--epoch", "9"], 0.3)):
        assert main([str(folder), *flags, "--out", str(tmp_path / "out")]) == 0
        assert float(table(tmp_path)["a"]["ImageNet"]) == value
    assert "epoch 10, of the public code" in capsys.readouterr().out


def test_equally_large_sets_are_told_apart_by_digest_or_else_by_path(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = add("a-seed0", 0), add("a-seed1", 1)
    one, other = "1" * 64, "2" * 64
    for first, second, status in (
        ({"pairs": "x.tar", "pairs_sha256": one}, {"pairs": "x.tar", "pairs_sha256": other}, 2),
        ({"pairs": "x.tar", "pairs_sha256": one}, {"pairs": "/there/x.tar", "pairs_sha256": one}, 0),
        ({"pairs": "x.tar"}, {"pairs": "y.tar", "pairs_sha256": one}, 2),
        ({"pairs": "x.tar"}, {"pairs": "./x.tar"}, 0),
        ({"pairs": "x.tar"}, None, 0),
    ):
        write_held_out(a, 0.4, data=first)
        write_held_out(b, 0.6, data=second)
        assert main([str(a), str(b)]) == status, (first, second)
        assert ("comes from different data" in capsys.readouterr().err) == (status == 2)


def test_a_mean_over_epochs_or_precisions_is_marked_and_never_best(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write_held_out(add(f"a-seed{seed}", seed), 0.5, epoch=seed + 1)
        folder = add(f"b-seed{seed}", seed, lr=2)
        write_held_out(folder, 0.4, epoch=2)
    assert main([f"{tmp_path}/logs/*", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "† a: image → text R@1 is a mean over results of epoch 1, fp32; epoch 2, fp32" in out
    assert "† b" not in out
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| a † |" in page
    assert "**" not in page


def test_iterations_and_a_latest_checkpoint_of_unknown_epoch(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = add("a")
    for name, score in (("epoch_3", 0.3), ("iter_500", 0.5)):
        write_datacomp(folder, {"imagenet1k": score})
        path = folder / "eval_results" / "epoch_3_eval_results.jsonl"
        path.rename(path.with_name(f"{name}_eval_results.jsonl"))
    write_held_out(folder, 0.5, epoch=None, iteration=500)
    assert main([str(folder), "--iter", "500", "--out", str(tmp_path / "out")]) == 0
    assert float(table(tmp_path)["a"]["ImageNet"]) == 0.5
    assert "all evaluated after iteration 500, fp32" in capsys.readouterr().out
    assert main([str(folder), "--iter", "7"]) == 2
    assert "has no evaluation of iteration 7" in capsys.readouterr().err
    assert main([str(folder), "--iter", "7", "--epoch", "3"]) == 2
    (folder / "eval_results" / "iter_500_eval_results.jsonl").rename(
        folder / "eval_results" / "latest_eval_results.jsonl"
    )
    (folder / "evaluation.json").unlink()
    capsys.readouterr()
    assert main([str(folder)]) == 0
    assert "all evaluated after latest, fp32" in capsys.readouterr().out


def test_missing_tasks_and_precisions_are_those_of_each_run(
    add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = dict.fromkeys(TASKS, 0.5)
    for seed, missing in enumerate(("mnist", "cars")):
        folder = add(f"a-seed{seed}", seed)
        write_datacomp(folder, {key: value for key, value in whole.items() if key != missing})
        path = folder / "eval_results" / "epoch_3_eval_results.jsonl"
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows[:-1], rows[-1].replace("fp32", "bf16")]) + "\n")
    assert main([f"{tmp_path}/logs/*"]) == 0
    out = capsys.readouterr().out
    assert "a-seed0: DataComp Average is incomplete, without mnist" in out
    assert "a-seed1: DataComp Average is incomplete, without cars" in out
    assert "evaluated after epoch 3, bf16 and fp32: a-seed0, a-seed1" in out


def test_tables_need_no_plotter(add: Add, tmp_path: Path) -> None:
    """requirements-training.txt has no matplotlib."""
    write_held_out(folder := add("a-seed1", seed=1), 0.5)
    program = "import sys; sys.modules['matplotlib'] = None; from evaluation.compare import main; sys.exit(main())"
    words = [sys.executable, "-c", program, str(folder), "--out", str(tmp_path / "tables")]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tables" / "comparison.md").stat().st_size > 0


def test_mistakes_are_one_line(add: Add, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, broken, mixed, good = add("empty"), add("broken"), add("mixed"), add("good")
    (broken / "evaluation.json").write_text("{}")
    write_held_out(good, 0.5)
    nothing, latin = add("nothing"), add("latin")
    (nothing / "evaluation.json").write_text('{"metrics": {}, "counts": null, "checkpoint": {"epoch": 1}}')
    (latin / "params.txt").write_bytes(b"name: \xe9\n")
    write_datacomp(mixed, {"mnist": 0.5})
    path = mixed / "eval_results" / "epoch_3_eval_results.jsonl"
    path.write_text(path.read_text() + path.read_text().replace("aaa", "bbb").replace("mnist", "cars"))
    (tmp_path / "file").touch()
    for arguments, message in (
        ([str(empty)], "empty has no evaluation;"),
        ([str(good), "--epoch", "7"], "good has no evaluation of epoch 7"),
        ([str(broken)], "evaluation.json cannot be understood"),
        ([str(nothing)], "evaluation.json cannot be understood"),
        ([str(latin)], "params.txt cannot be read"),
        ([str(mixed)], "results of several checkpoints"),
        ([f"{tmp_path}/none*"], "names no run folder"),
        ([str(good), "--metrics", "nothing"], "--metrics nothing: unknown"),
        ([str(good), "--out", str(tmp_path / "file")], "choose another --out"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
