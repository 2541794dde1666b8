"""The page that looks inside a run, from the command line: what is in it, what must not be, and its errors."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from evaluation.gallery import main, parse_args
from evaluation.run_folder import RunFolder
from evaluation.thumbnails import MOST_LOSSLESS_BYTES, SIDE, Sprite, encode_thumbnail

from .conftest import image_bytes
from .looks import HARMFUL, add_prototypes, write_harmful_pairs

# All that the page is made of. Of the attributes that make a browser load something it has href alone.
TAG_NAMES = """
    html head meta link title style body a svg symbol image use rect line text header nav main section article footer div span
    p b bdi sub h1 h2 h3 h4 ul ol li dl dt dd figure figcaption details summary table thead tbody tr th td
"""
LOADING = {
    "src",
    "srcset",
    "action",
    "formaction",
    "data",
    "poster",
    "background",
    "ping",
    "xlink:href",
    "style",
    "srcdoc",
}


class Outline(HTMLParser):
    """Tags with attributes, text, and whether every element is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


@pytest.fixture
def look(make_run: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """look(*flags): the page of a run with prototypes and harmful captions; its own validation pairs are searched."""
    run = make_run("a<b>&'run'", epochs=(1,))
    write_harmful_pairs(tmp_path / "pairs" / "0.tar")
    with open(run / "params.txt", "a") as file:
        file.write(f"val_data: {tmp_path}/pairs\nval_num_samples: None\n")
    add_prototypes(run / "checkpoints" / "epoch_1.pt")

    def build(*flags: str) -> str:
        assert main(["--train_output_dir", str(run), "--device", "cpu", "--workers", "0", *flags]) == 0
        return (run / "gallery.html").read_text(encoding="utf-8")

    return build


def test_the_page(look: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "<i>photo.jpg"
    photo.write_bytes(image_bytes(3, 300, "JPEG"))
    page = look("--query", "a disc", HARMFUL[0], "--images", str(photo), "--random", "12")
    outline = Outline(page)
    assert [tag for tag, _ in outline.tags if tag in ("h1", "h2")] == ["h1"] + ["h2"] * 4
    assert "a<b>&'run': a look inside" in outline.text
    for text in (*(" ".join(text.replace("\x00", "").split()) for text in HARMFUL[:4]), "<i>photo.jpg", "epoch 1"):
        assert text in outline.text
    assert "\u202e" not in page
    assert "long " * 50 not in page
    assert "12 from " in outline.text  # pairs
    assert "8 prototypes in effect" in outline.text
    assert f"{len(page.encode()) / 1e6:.2f} MB" in capsys.readouterr().out
    # Each image of the set once, and the one from outside.
    identifiers = outline.values("id")
    assert len(identifiers) == len(set(identifiers))
    assert {name for name in identifiers if re.fullmatch(r"[pf]\d+", name)} == {"f0", *(f"p{i}" for i in range(12))}
    pictures = [attributes for tag, attributes in outline.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) > 2 * 12
    assert all(attributes["aria-label"] for attributes in pictures)


def test_nothing_comes_from_outside_and_nothing_runs(look: Callable[..., str]) -> None:
    page = look("--random", "12")
    outline = Outline(page)
    assert {tag for tag, _ in outline.tags} <= set(TAG_NAMES.split())
    names = {name for _, attributes in outline.tags for name in attributes}
    assert not names & LOADING
    assert not [name for name in names if name.startswith("on")]
    targets = set(outline.values("href"))
    for target in targets:
        assert target.startswith("#") or target == "data:," or target.startswith("data:image/webp;base64,"), target
    assert {target[1:] for target in targets if target.startswith("#")} <= set(outline.values("id"))
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (attributes["content"] or "" for _, attributes in outline.tags if "http-equiv" in attributes)
    assert policy.split("; ")[:3] == ["default-src 'none'", "img-src data:", f"style-src 'sha256-{digest}'"]


def test_the_same_flags_give_the_same_page(look: Callable[..., str]) -> None:
    page = look("--random", "3", "--seed", "5")
    assert look("--random", "3", "--seed", "5", "--batch_size", "256") == page
    assert look("--random", "3", "--seed", "6") != page


def test_parts_that_are_not_there(make_run: Callable[..., Path], pair_shards: str, tmp_path: Path) -> None:
    """No search was asked for, and the run has no prototypes."""
    run, out = make_run("run", epochs=(1, 2)), tmp_path / "page.html"
    flags = f"--train-output-dir {run} --epoch 1 --pairs {pair_shards} --random 0 --workers 0 --out {out}"
    assert main(flags.split()) == 0
    outline = Outline(out.read_text(encoding="utf-8"))
    assert "holds no state of an objective" in outline.text
    assert "Prototype 0" not in outline.text
    assert {"negatives", "prototypes"} <= set(outline.values("id"))
    assert not {"text-to-image", "image-to-text"} & set(outline.values("id"))
    assert not (run / "gallery.html").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_that_goes_on(
    replaced: bool,
    make_run: Callable[..., Path],
    pair_shards: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another checkpoint comes, beside the one that was opened or in its place, after its prototypes have been read."""
    run = make_run("run", epochs=(1, 2))
    first, second = (run / "checkpoints" / f"epoch_{epoch}.pt" for epoch in (1, 2))
    coming = second.rename(run / "coming.pt")

    def read_and_go_on(path: Path) -> str:
        assert path == first
        os.utime(coming, (1, 1))  # another time of writing, however coarse the disk's clock
        coming.rename(first if replaced else second)
        return "no prototypes"

    loaded = []
    load = RunFolder.load_checkpoint
    monkeypatch.setattr("evaluation.gallery.read_prototypes", read_and_go_on)
    monkeypatch.setattr(RunFolder, "load_checkpoint", lambda *args: loaded.append(args[1].path) or load(*args))
    status = main(["--train_output_dir", str(run), "--pairs", pair_shards, "--workers", "0", "--random", "1"])
    assert loaded == [first]
    if replaced:
        assert status == 2
        assert "epoch_1.pt was replaced while it was read" in capsys.readouterr().err
        assert not (run / "gallery.html").exists()
    else:
        assert status == 0
        text = Outline((run / "gallery.html").read_text(encoding="utf-8")).text
        assert "epoch 1" in text
        assert "epoch 2" not in text


def test_validation_pairs_in_a_csv_file(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("run", epochs=(1,))
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
    lines = ["image,text", *(f"{tmp_path}/{i}.png,disc {i}" for i in range(4))]
    (tmp_path / "val.csv").write_text("\n".join(lines))
    columns = "csv_img_key: image\ncsv_caption_key: text\ncsv_separator: ,\nval_num_samples: 3\n"
    with open(run / "params.txt", "a") as file:
        file.write(f"val_data: {tmp_path}/val.csv\n{columns}")
    assert main(["--train_output_dir", str(run), "--workers", "0", "--random", "2"]) == 0
    assert "3 from " in Outline((run / "gallery.html").read_text(encoding="utf-8")).text


def test_mistakes_are_one_line(
    make_run: Callable[..., Path],
    pair_shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run("run", epochs=(1,))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "queries.json").write_text("[]")
    pairs = f"--pairs {pair_shards}"
    for flags, message in (
        ("", "params.txt says val_data: None"),
        (f"{pairs} --epoch 7", "has no epoch_7.pt"),
        (f"--pairs {tmp_path}/gone.tar", "gone.tar does not exist"),
        (f"{pairs} --images {tmp_path}/gone.png", f"--images {tmp_path}/gone.png cannot be read"),
        (
            f"{pairs} --images {tmp_path}/broken.png",
            f"--images {tmp_path}/broken.png is broken or no image; give a whole file of JPEG, PNG",
        ),
        (f"{pairs} --queries {tmp_path}/queries.json", "is an empty list"),
        (f"{pairs} --random 1000", "--random: 1000"),
        (f"{pairs} --random -1", "--random: -1"),
        (f"{pairs} --out {tmp_path}", "is a folder"),
        (f"{pairs} --out {tmp_path}/gone/page.html", "gone is no folder"),
        (f"{pairs} --device quantum", "--device quantum cannot be used here"),
        (f"{pairs} --batch-size 0", "at least 1"),
    ):
        assert main(["--train_output_dir", str(run), *flags.split()]) == 2
        errors = capsys.readouterr().err.strip()
        assert "\n" not in errors
        assert errors.startswith("error: ")
        assert message in errors
    for texts in (["a", ""], ["  "]):
        assert main(["--train_output_dir", str(run), *pairs.split(), "--query", *texts]) == 2
        assert capsys.readouterr().err.startswith('error: --query "" is blank')
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0", "WORLD_SIZE": "2"})
    assert main(["--train_output_dir", str(run), *pairs.split()]) == 2
    assert "one process" in capsys.readouterr().err
    assert not (run / "gallery.html").exists()


def test_val_data_that_is_gone_is_named(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("run", epochs=(1,))
    with open(run / "params.txt", "a") as file:
        file.write(f"val_data: {tmp_path}/gone\n")
    assert main(["--train_output_dir", str(run)]) == 2
    error = capsys.readouterr().err
    assert "params.txt" in error
    assert "--pairs SHARDS" in error


def test_flags_take_both_spellings() -> None:
    assert parse_args(["--train-output-dir=a", "--batch-size", "3"]) == parse_args(
        ["--train_output_dir", "a", "--batch_size=3"]
    )


def test_thumbnails_are_small_and_drawings_exact() -> None:
    drawing = Image.open(io.BytesIO(image_bytes(1, 64)))
    data, size = encode_thumbnail(drawing.convert("RGB"))
    assert size == (64, 64)
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == drawing.convert("RGB").tobytes()
    noise = Image.frombytes("RGB", (900, 300), os.urandom(900 * 300 * 3))
    data, size = encode_thumbnail(noise)
    assert size == (SIDE, round(SIDE / 3))
    lossless = io.BytesIO()
    noise.resize(size).save(lossless, "WEBP", lossless=True)
    assert len(lossless.getvalue()) > MOST_LOSSLESS_BYTES
    assert len(data) < len(lossless.getvalue()) / 2


def test_an_image_is_in_the_page_once() -> None:
    sprite = Sprite()
    for seed in (1, 1, 2):
        sprite.add(f"p{seed}", Image.open(io.BytesIO(image_bytes(seed))).convert("RGB"))
    assert (len(sprite), sprite.html().count("data:image"), "p1" in sprite) == (2, 2, True)
    assert "&quot;&lt;&gt;" in sprite.show("p1", '"<>')
    with pytest.raises(KeyError):
        sprite.show("p3", "not there")
