"""Tables, curves and the gallery, on results made up for it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.curves import plot_curves
from evaluation.figure_style import COLORS
from evaluation.gallery_picture import MATCH, draw_gallery, gallery_size
from evaluation.records import read_records, series
from evaluation.report import Result, markdown, table_rows, terminal_table, write_report
from evaluation.search import Hit, Query

NAME = "retrieval/image_to_text_"
FIRST_BLUE = tuple(bytes.fromhex(COLORS[0][1:]))


def result(run: str, recall: float, rank: float, **metrics: float | None) -> Result:
    """A result of 1,000 pairs."""
    return Result(
        run=run,
        objective="neuclip",
        model="ViT-B-32",
        checkpoint={"file": "checkpoints/epoch_3.pt", "sha256": "0123456789abcdef", "epoch": 3, "iteration": None},
        data={"pairs": "test.tar", "zeroshot": None},
        metrics={f"{NAME}R@1": recall, f"{NAME}mean_rank": rank, "zeroshot/top5": None, **metrics},
        chance={f"{NAME}R@1": 0.001, f"{NAME}mean_rank": 500.5, "zeroshot/top5": None},
        counts={"pairs": 1000, "distinct_captions": 990},
    )


def test_table_of_one_run() -> None:
    rows = table_rows([result("a", 0.0725, 91.0)])
    assert [(row.metric, row.values, row.chance, row.factor) for row in rows] == [
        ("image → text R@1", ["7.25 %"], "0.10 %", "72.5×"),
        ("image → text mean rank", ["91.0"], "500.5", "5.5×"),
    ]
    lines = terminal_table([result("a", 0.5, 1.0)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[-4:] == ["%", "0.10", "%", "500×"]


def test_best_of_several_runs_is_bold() -> None:
    page = markdown([result("a|b", 0.07, 91.0), result("c", 0.08, 99.0)])
    assert "| metric | a\\|b | c | chance | ×chance (a\\|b) |" in page
    assert "| image → text R@1 | 7.00 % | **8.00 %** | 0.10 % | 70.0× |" in page
    assert "| image → text mean rank | **91.0** | 99.0 | 500.5 | 5.5× |" in page  # lower is better
    assert "1,000 held-out pairs with 990 different captions" in page


def test_a_run_without_a_metric_keeps_its_column() -> None:
    with_zero_shot = result("a", 0.1, 9.0, **{"zeroshot/top1": 0.2})
    rows = table_rows([with_zero_shot, result("b", 0.1, 9.0)])
    assert rows[-1].values == ["20.00 %", "–"]
    assert rows[-1].factor == "–"


def test_json_has_null_and_never_nan(tmp_path: Path) -> None:
    json_path, _ = write_report(tmp_path, [result("a", 0.1, 9.0)])
    stored = json.loads(json_path.read_text())
    assert stored["metrics"]["zeroshot/top5"] is None
    assert Result(**stored) == result("a", 0.1, 9.0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, [result("a", float("nan"), 9.0)])


def test_records_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "loss": 5}\n{"step": 1, "loss": 6}\n{"step": 2, "loss": 4}\n{"step": 3}\n[1]\n{"ste')
    records = read_records(file)
    assert len(records) == 4
    assert series(records, "step", "loss") == ([1.0, 2.0], [6.0, 4.0])
    assert series([{"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}], "step", "loss") == ([], [])
    assert read_records(tmp_path / "missing.jsonl") == []


def test_lines_that_json_cannot_hold_are_left_out(tmp_path: Path) -> None:
    """A number of more digits than Python reads, brackets deeper than it follows, and a number too large for a float."""
    file = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": 4}',
        f'{{"step": {"1" * 5000}}}',
        "[" * 100_000,
        f'{{"step": 2, "loss": {"1" * 400}}}',
    ]
    file.write_text("\n".join(lines))
    records = read_records(file)
    assert [record["step"] for record in records] == [1, 2]
    assert series(records, "step", "loss") == ([1.0], [4.0])


@pytest.mark.parametrize("name", ["curves.png", "gallery.png"])
def test_pictures_are_written_whole_or_not_at_all(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name

    def draw() -> None:
        if name == "curves.png":
            plot_curves({"run": tmp_path}, path)
        else:
            draw_gallery(path, "run", "", [Query("word")], [[]], lambda i: Image.new("RGB", (8, 8)), 1)

    def fail(file: Path | str, *_: object, **__: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    draw()
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda _, file, *rest, **more: fail(file))
    monkeypatch.setattr(Figure, "savefig", lambda _, file, *rest, **more: fail(file))
    with pytest.raises(OSError, match="No space"):
        draw()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_curves_show_what_is_there(tmp_path: Path) -> None:
    """An empty run and a full one can share the picture; recorded values change it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "empty").mkdir()
    lines = [{"step": step, "loss": 1 / step, "lr": 0.1, "temperature": 0.07} for step in range(1, 9)]
    (tmp_path / "full" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "full" / "results.jsonl").write_text('{"epoch": 1, "zeroshot-val-top1": 0.3, "text_to_image_R@1": 0.1}')
    plot_curves({"full": tmp_path / "full", "empty": tmp_path / "empty"}, tmp_path / "both.png")
    plot_curves({"empty": tmp_path / "empty"}, tmp_path / "none.png")
    with Image.open(tmp_path / "both.png") as both, Image.open(tmp_path / "none.png") as none:
        assert both.size == none.size == (1440, 960)
        assert FIRST_BLUE in {color for _, color in both.convert("RGB").getcolors(1 << 20)}  # the first run's blue
        assert FIRST_BLUE not in {color for _, color in none.convert("RGB").getcolors(1 << 20)}


def test_gallery_frames_and_thumbnails(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), "#123456")
    hits = [[Hit(0, 0.5, True), Hit(1, -0.25, False)]]
    for name, matches in (("green", True), ("plain", False)):
        row = [[Hit(0, 0.5, matches), *hits[0][1:]]]
        draw_gallery(
            tmp_path / f"{name}.png", "run", "neuclip · epoch 3", [Query("word " * 60)], row, lambda i: image, 1402
        )
    green, plain = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("green", "plain"))
    assert green.size == plain.size == gallery_size(1)

    def count(page: Image.Image, color: str) -> int:
        wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
        return sum(number for number, found in page.getcolors(1 << 20) if found == wanted)

    assert count(green, MATCH) > count(plain, MATCH) + 1000  # a frame 3 pixels wide around a tile
    assert count(plain, "#123456") > 2 * 120 * 60  # both images, whole, at twice their size
    assert green.getpixel((2, 2)) == (255, 255, 255)
