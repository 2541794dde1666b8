"""Tables read back from all three formats; what an ablation and the times of the NPN put into them."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

import pytest

from evaluation.comparison.ablation import PAPER_TABLES, ablation_table
from evaluation.comparison.groups import group_runs
from evaluation.comparison.npn_time import step_times, time_table
from evaluation.comparison.runs import open_runs
from evaluation.comparison.tables import Cell, Column, Table, comma_separated, latex, markdown, with_best
from evaluation.errors import UserError
from training.params import parse_args

from .conftest import RunMaker, write_lines

R1 = "text_to_image_R@1"


def rows_of_csv(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(comma_separated(table))))


def rows_of_markdown(table: Table) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(table).splitlines()]


def rows_of_latex(table: Table) -> list[list[str]]:
    lines = [line.removesuffix(r" \\") for line in latex(table).splitlines() if line.endswith(r"\\")]
    return [line.split(" & ") for line in lines]


TABLE = Table(
    [Column("flag", "a_flag"), Column("recall", "R@1, %", ".2f", 100.0), Column("loss", "loss")],
    [
        [Cell("x|y & 50 %"), Cell(0.12345, 0.01, best=True), Cell(1.23456)],
        [Cell(None), Cell(0.1), Cell(None)],
    ],
)


def test_the_three_formats() -> None:
    assert rows_of_csv(TABLE) == [
        {"flag": "x|y & 50 %", "recall": "0.12345", "recall_std": "0.01", "loss": "1.23456"},
        {"flag": "", "recall": "0.1", "recall_std": "", "loss": ""},
    ]
    assert markdown(TABLE).splitlines() == [
        "| a_flag | R@1, % | loss |",
        "| --- | ---: | ---: |",
        r"| x\|y & 50 % | **12.35 ± 1.00** | 1.235 |",
        "| – | 10.00 | – |",
    ]
    assert latex(TABLE).splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"a\_flag & R@1, \% & loss \\",
        r"\midrule",
        r"x\textbar{}y \& 50 \% & \textbf{12.35 $\pm$ 1.00} & 1.235 \\",
        r"-- & 10.00 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_best_of_a_column() -> None:
    cells = [Cell(1.0), Cell(None), Cell(3.0), Cell(3.0)]
    assert [cell.best for cell in with_best(cells, True)] == [False, False, True, True]
    assert [cell.best for cell in with_best(cells, False)] == [True, False, False, False]
    assert not any(cell.best for cell in with_best(cells, None))
    assert not any(cell.best for cell in with_best([Cell(1.0), Cell(None)], True))


def test_an_ablation_by_two_flags(make_run: RunMaker, tmp_path: Path) -> None:
    offsets = {(64, 0): 0.0, (64, 1): 0.02, (256, 0): 0.05, (256, 1): 0.07}
    for (protos, seed), offset in offsets.items():
        make_run(f"m{protos}-s{seed}", offset, npn_num_protos=protos, seed=seed, npn_repetition=10)
    make_run("m64-u5", 0.3, npn_num_protos=64, npn_repetition=5)
    by = ("npn_num_protos", "npn_repetition")
    groups, notes = group_runs(open_runs([str(tmp_path / "logs" / "*")]), by)
    table = ablation_table(groups, by, (R1, "clip_val_loss", "DataComp Average"))
    rows = rows_of_csv(table)
    assert notes == []
    assert [[row[flag] for flag in (*by, "seeds")] for row in rows] == [
        ["64", "5", "1"],
        ["64", "10", "2"],
        ["256", "10", "2"],
    ]
    assert [float(row[R1]) for row in rows] == pytest.approx([0.5, 0.21, 0.26])
    assert rows[0][f"{R1}_std"] == ""
    assert float(rows[2][f"{R1}_std"]) == pytest.approx(statistics.stdev([0.05, 0.07]))
    assert [row["DataComp Average"] for row in rows] == ["", "", ""]
    head, _, *lines = rows_of_markdown(table)
    assert head == [*by, "seeds", "text → image R@1, %", "validation contrastive loss", "DataComp Average, %"]
    assert lines[0] == ["64", "5", "1", "**50.00**", "1.3", "–"]
    assert lines[1] == ["64", "10", "2", "21.00 ± 1.41", "**1.01 ± 0.01414**", "–"]
    assert rows_of_latex(table)[2] == ["64", "10", "2", r"21.00 $\pm$ 1.41", r"\textbf{1.01 $\pm$ 0.01414}", "--"]


def test_rows_of_the_same_value_name_their_runs(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("low", lr=0.1)
    make_run("high", lr=0.2)
    groups, _ = group_runs(open_runs([str(tmp_path / "logs" / "*")]), ["npn_restart_iter"])
    table = ablation_table(groups, ["npn_restart_iter"], [R1])
    assert [(row["npn_restart_iter"], row["runs"]) for row in rows_of_csv(table)] == [("500", "high"), ("500", "low")]


def test_large_values_of_flags_stay_readable(make_run: RunMaker, tmp_path: Path) -> None:
    for value in (1048576, 65536):
        make_run(f"m{value}", npn_num_protos=value)
    groups, _ = group_runs(open_runs([str(tmp_path / "logs" / "*")]), ["npn_num_protos"])
    rows = rows_of_markdown(ablation_table(groups, ["npn_num_protos"], [R1]))
    assert [row[0] for row in rows[2:]] == ["65536", "1048576"]


def test_the_papers_names_are_flags() -> None:
    assert vars(parse_args(["--dataset-type", "synthetic"])).keys() >= set(PAPER_TABLES.values())


def test_the_time_of_the_npn(make_run: RunMaker) -> None:
    folder = make_run("a")
    [run] = open_runs([str(folder)])
    assert step_times(run, 1) == (pytest.approx(0.001), pytest.approx(0.003), pytest.approx(0.010), 79)
    table = time_table([run], 1)
    [row] = rows_of_csv(table)
    assert (row["run"], row["objective"], row["steps"]) == ("a", "neuclip", "79")
    assert float(row["normalizer_share"]) == pytest.approx(0.1)
    assert rows_of_markdown(table)[2] == ["a", "neuclip", "1.00", "3.00", "10.00", "10.00", "79"]


def test_intervals_count_by_their_steps(make_run: RunMaker) -> None:
    """Two intervals of one step beside one of twenty: the median step is one of the twenty."""
    folder = make_run("a")
    lines = [
        {"step": step, "seconds_per_step": total, "objective_seconds": total / 2, "normalizer_seconds": total / 4}
        for step, total in ((10, 7.0), (11, 5.0), (12, 5.0), (32, 1.0))
    ]
    write_lines(folder / "metrics.jsonl", lines)
    [run] = open_runs([str(folder)])
    assert step_times(run, 10) == (0.25, 0.5, 1.0, 22)
    # A resumed run writes a step again: the later line holds.
    write_lines(folder / "metrics.jsonl", [*lines, {**lines[-1], "seconds_per_step": 2.0}])
    assert step_times(*open_runs([str(folder)]), 10).total == 2.0


def test_an_objective_without_normalizers(make_run: RunMaker) -> None:
    folder = make_run("a", objective="openclip")
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    write_lines(file, [{k: v for k, v in line.items() if k != "normalizer_seconds"} for line in lines])
    table = time_table(open_runs([str(folder)]), 1)
    assert rows_of_markdown(table)[2] == ["a", "openclip", "–", "3.00", "10.00", "–", "79"]


def test_runs_without_times_are_told(make_run: RunMaker) -> None:
    folder = make_run("a")
    with pytest.raises(UserError, match="--skip-steps 80, it ends at 80"):
        step_times(*open_runs([str(folder)]), 80)
    write_lines(folder / "metrics.jsonl", [{"step": 1, "loss": 2.0, "seconds_per_step": 0.1}])
    with pytest.raises(UserError, match="has no objective_seconds"):
        step_times(*open_runs([str(folder)]), 0)
