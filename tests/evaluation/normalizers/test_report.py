"""Normalizer errors as a file, a table and a picture, on numbers made up for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from evaluation.figure_style import COLORS
from evaluation.normalizers.report import MARKERS, ErrorFile, draw, markdown, newest, write_picture
from evaluation.run_folder import Checkpoint, RunFolder


def setting(batch: int) -> dict[str, Any]:
    return {"data": "train.tar", "batch": batch, "probes": 512, "seed": 0}


def estimate(mse: float | None, unknown: float = 0.0) -> dict[str, Any]:
    sides: dict[str, Any] = {
        name: {"mse": mse and mse * factor, "bias": mse and -0.5 * factor, "mean": mse and -7.0}
        for name, factor in (("image", 1.0), ("text", 3.0))
    }
    return {**sides, "mse": mse and 2 * mse, "unknown": unknown}


def measured(step: int, own: dict[str, Any] | None, used: float = 0.25) -> dict[str, Any]:
    return {
        "step": step,
        "samples_seen": 64 * step,
        "temperature": 0.07,
        "truth": {"image": -6.0, "text": -6.5},
        "estimates": {"batch": estimate(1.0), "own": own, "used": estimate(used)},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "logs"


def run_of(folder: Path, name: str, objective: str) -> RunFolder:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "params.txt").write_text(f"model: ViT-B-32\nname: {name}\nobjective: {objective}\n")
    return RunFolder(folder / name)


def checkpoint(
    run: RunFolder, epoch: int | None = None, iteration: int | None = None, content: str = "a"
) -> Checkpoint:
    path = run.path / f"{epoch}-{iteration}.pt"
    path.write_text(content)
    return Checkpoint(path, epoch, iteration)


def error_file(
    folder: Path, name: str, objective: str, batch: int = 64, own: dict[str, Any] | None = None
) -> ErrorFile:
    """Two checkpoints, measured."""
    run = run_of(folder, name, objective)
    file = ErrorFile(run, setting(batch))
    for epoch in (2, 1):
        file.add(checkpoint(run, epoch), measured(10 * epoch, own))
    return file


def colors_of(figure: Figure, panel: int = 0) -> dict[str, str]:
    return {str(line.get_label()): to_hex(line.get_color()) for line in figure.axes[panel].get_lines()}


def legend_of(figure: Figure) -> dict[str, str]:
    (legend,) = figure.legends
    return {text.get_text(): to_hex(line.get_color()) for text, line in zip(legend.get_texts(), legend.get_lines())}


def test_an_objective_has_a_colour_where_it_is_one_run_of_a_panel(folder: Path) -> None:
    files = [
        error_file(folder, f"{objective}-{batch}", objective, batch, own)
        for objective, own in (("openclip", None), ("neuclip", estimate(0.5)))
        for batch in (256, 64)
    ]
    figure = draw(files)
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["global batch 64", "global batch 256"]
    assert colors_of(figure) == {
        "openclip-64, used": COLORS[0],
        **{f"neuclip-64, {name}": COLORS[1] for name in ("used", "own", "batch")},
    }
    assert colors_of(figure, 1)["neuclip-256, own"] == COLORS[1]
    legend = legend_of(figure)
    assert list(legend) == ["openclip", "neuclip", "used", "own", "batch"]
    assert (legend["openclip"], legend["neuclip"]) == COLORS[:2]


def test_runs_of_one_objective_are_told_apart_by_name(folder: Path) -> None:
    names = [f"fastclip-v{version}" for version in range(4)]
    figure = draw([error_file(folder, name, "fastclip", own=estimate(0.5)) for name in names])
    assert [colors_of(figure)[f"{name}, used"] for name in names] == list(COLORS[:4])
    legend = legend_of(figure)
    assert list(legend) == [*names, "used", "own", "batch"]
    assert [legend[name] for name in names] == list(COLORS[:4])


def test_runs_of_one_name_go_by_their_paths(folder: Path, tmp_path: Path) -> None:
    files = [error_file(where, "run", "openclip") for where in (folder, tmp_path / "other")]
    assert list(legend_of(draw(files)))[:2] == [str(folder / "run"), str(tmp_path / "other" / "run")]


def test_more_runs_than_colours_have_other_markers(folder: Path) -> None:
    figure = draw([error_file(folder, f"seed{seed}", "openclip") for seed in range(len(COLORS) + 2)])
    looks = {(to_hex(line.get_color()), line.get_marker()) for line in figure.axes[0].get_lines()}
    assert len(looks) == len(COLORS) + 2
    assert {marker for _, marker in looks} == set(MARKERS[:2])
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_the_table(folder: Path) -> None:
    run = run_of(folder, "a|b", "fastclip")
    file = ErrorFile(run, setting(64))
    file.add(checkpoint(run, iteration=500), measured(500, estimate(None, 1.0)))
    file.add(checkpoint(run, epoch=3), measured(30, estimate(0.5, 0.25)))
    lines = markdown([file, error_file(folder, "plain", "openclip")]).splitlines()
    assert lines[0].endswith("| true mean α | own unknown, % |")
    assert len({line.replace("\\|", "").count("|") for line in lines[:6]}) == 1
    told = "-1.000 | -7.000 | -6.250"
    assert (
        lines[2] == f"| a\\|b | 64 | epoch 3 | 0.0700 | 0.250 / 0.750 | 0.500 / 1.500 | 1.000 / 3.000 | {told} | 25.0 |"
    )
    assert lines[3] == f"| a\\|b | 64 | iter 500 | 0.0700 | 0.250 / 0.750 | – / – | 1.000 / 3.000 | {told} | 100.0 |"
    assert lines[4] == f"| plain | 64 | epoch 1 | 0.0700 | 0.250 / 0.750 | – | 1.000 / 3.000 | {told} | – |"
    assert "own unknown, %" not in markdown([error_file(folder, "all", "neuclip", own=estimate(0.5))])


def test_a_record_is_replaced_by_that_of_newer_weights_in_the_same_setting(folder: Path) -> None:
    file = error_file(folder, "run", "openclip")
    run = file.run
    file.write()
    other = ErrorFile(run, setting(128))
    assert other.records == []
    other.add(checkpoint(run, 1), measured(10, None))
    other.write()
    again = ErrorFile(run, setting(64))
    old, new = checkpoint(run, 1), checkpoint(run, 1, content="b")
    assert not again.has(new)
    again.add(new, measured(12, None, used=0.125))
    again.add(checkpoint(run, iteration=5), measured(5, None))
    assert [(r["epoch"], r["iteration"], r["step"]) for r in again.records] == [
        (None, 5, 5),
        (1, None, 12),
        (2, None, 20),
    ]
    assert again.records[1]["estimates"]["used"]["mse"] == 0.25
    assert again.has(new)
    again.write()
    stored = json.loads((run.path / "normalizer_error.json").read_text())
    assert (stored["run"], stored["objective"], len(stored["records"])) == ("run", "openclip", 4)
    assert len(ErrorFile(run, setting(128)).records) == 1
    old.path.write_text("c")
    assert not again.has(old)


def test_the_newest_setting_is_found_without_checkpoints(folder: Path) -> None:
    first = error_file(folder, "run", "openclip")
    first.write()
    later = ErrorFile(first.run, setting(128))
    later.add(checkpoint(first.run, 4), measured(40, None))
    later.write()
    found = newest(first.run)
    assert (found.setting["batch"], [record["step"] for record in found.records]) == (128, [40])
    assert newest(run_of(folder, "nothing", "openclip")).records == []


@pytest.mark.parametrize("content", ["", "[]", '{"records": 1}', "[" * 100_000, '{"records": [1, null]}'])
def test_a_file_that_is_not_ours_is_written_anew(content: str, folder: Path) -> None:
    run = run_of(folder, "run", "openclip")
    (run.path / "normalizer_error.json").write_text(content)
    assert ErrorFile(run, setting(64)).records == []


def test_files_are_written_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = error_file(folder, "run", "openclip")
    file.write()
    pictures = write_picture(draw([file]), folder)
    assert [path.name for path in pictures] == ["normalizer_error.pdf", "normalizer_error.png"]
    file.add(checkpoint(file.run, 1), measured(11, None))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for write in (file.write, lambda: write_picture(draw([file, file]), folder)):
        with pytest.raises(OSError, match="No space"):
            write()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    file.add(checkpoint(file.run, 1), measured(11, None, used=float("nan")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.write()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
