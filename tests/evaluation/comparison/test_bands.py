"""Curves and their bands: what the axes hold is what the runs have told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from evaluation.comparison.bands import band, draw_curves
from evaluation.comparison.groups import Group, group_runs
from evaluation.comparison.runs import open_runs
from evaluation.figure_style import COLORS, save_figure

from .conftest import RunMaker

R1 = "text_to_image_R@1"


def groups_of(logs: Path, *by: str) -> list[Group]:
    return group_runs(open_runs([str(logs / "*")]), by)[0]


def edges(panel: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of a panel's one band."""
    [collection] = panel.collections
    vertices = collection.get_paths()[0].vertices
    xs = np.unique(vertices[:, 0])
    return tuple(np.array([pick(vertices[vertices[:, 0] == x, 1]) for x in xs]) for pick in (np.min, np.max))  # type: ignore[return-value]


def test_a_line_is_the_mean_and_a_band_the_deviation(make_run: RunMaker, tmp_path: Path) -> None:
    for seed, offset in enumerate((0.0, 0.04)):
        make_run(f"a-s{seed}", offset, seed=seed)
    make_run("b", 0.5, lr=1.0)
    figure = draw_curves(groups_of(tmp_path / "logs"), [R1, "contrastive_loss"], "samples")
    recall, loss = figure.axes
    line, other = recall.get_lines()
    assert line.get_xdata() == pytest.approx([320, 640])
    assert line.get_ydata() == pytest.approx([12, 22])  # percent
    assert other.get_ydata() == pytest.approx([60, 70])
    half = 100 * np.std([0.0, 0.04], ddof=1)
    lower, upper = edges(recall)
    assert lower == pytest.approx(np.array([12, 22]) - half)
    assert upper == pytest.approx(np.array([12, 22]) + half)
    steps = np.array([1, 20, 40, 41, 60, 80])
    assert loss.get_lines()[0].get_xdata() == pytest.approx(8 * steps)
    assert loss.get_lines()[0].get_ydata() == pytest.approx(4.02 - steps / 100)
    assert [panel.get_title(loc="left") for panel in figure.axes] == [
        "text → image R@1, %",
        "mini-batch contrastive loss",
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a, 2 seeds", "b"]
    assert line.get_color() != other.get_color()
    assert line.get_linestyle() != other.get_linestyle()


def test_one_run_has_no_band(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a")
    figure = draw_curves(groups_of(tmp_path / "logs"), [R1], "epoch")
    assert not figure.axes[0].collections
    assert figure.axes[0].get_lines()[0].get_xdata() == pytest.approx([1, 2])


def test_a_mean_ends_where_the_first_run_does_and_lies_between_other_intervals(
    make_run: RunMaker, tmp_path: Path
) -> None:
    make_run("a-0", 0.0, seed=0)
    folder = make_run("a-1", 1.0, seed=1, told=1)
    metrics = folder / "metrics.jsonl"
    first, _, last = metrics.read_text().splitlines()
    metrics.write_text(f"{first}\n{last}\n")
    [group] = groups_of(tmp_path / "logs")
    found = band(group, "contrastive_loss", "step")
    assert found is not None
    assert found.x == pytest.approx([1, 20, 40])
    assert found.mean == pytest.approx([4.49, 4.30, 4.10])  # linear in the step in both


def test_a_metric_that_no_group_has_leaves_an_empty_panel(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a")
    groups = groups_of(tmp_path / "logs")
    assert band(groups[0], "gamma", "step") is None
    figure = draw_curves(groups, [R1, "gamma"], "step")
    assert [text.get_text() for text in figure.axes[1].texts] == ["not recorded"]


def test_more_groups_than_colours_are_still_told_apart(make_run: RunMaker, tmp_path: Path) -> None:
    for number in range(len(COLORS) + 3):
        make_run(f"r{number}", lr=float(number))
    lines = draw_curves(groups_of(tmp_path / "logs"), [R1], "step").axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == len(COLORS) + 3


def test_files_of_the_same_figure_are_the_same(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a")
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        figure = draw_curves(groups_of(tmp_path / "logs"), [R1, "contrastive_loss"], "samples")
        paths = save_figure(figure, tmp_path / name, "curves")
        assert [path.name for path in paths] == ["curves.pdf", "curves.png"]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["curves.pdf", "curves.png"]
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b"%PDF")
    assert b"CreationDate" not in contents[0][0]
    assert contents[0][1].startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_written_leaves_the_old_one(
    make_run: RunMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a")
    figure = draw_curves(groups_of(tmp_path / "logs"), [R1], "samples")
    out = tmp_path / "out"
    out.mkdir()
    (out / "curves.pdf").write_text("old")

    def full(path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        save_figure(figure, out, "curves")
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("curves.pdf", "old")]
