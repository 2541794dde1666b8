"""The study's builder on a small made-up package: what it makes of every rule, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from icon_package import DROPPED_SETS, EMOJI_SETS, make_sets, write_package
from shard_files import digests, read_split, read_tar

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "data"
sys.path.insert(0, str(SCRIPTS))

if importlib.util.find_spec("resvg_py") is None:
    pytest.skip("needs the packages of requirements-quickstart.txt", allow_module_level=True)

import build_study  # noqa: E402
from building.names import concept_key  # noqa: E402
from icons import dataset  # noqa: E402
from icons.duplicates import near_duplicate_share  # noqa: E402
from icons.names import Meaning, Naming, style_words  # noqa: E402
from icons.package import integrity  # noqa: E402
from icons.rendering import Job, Stored, render, svg_text  # noqa: E402
from icons.splits import Split, settle_combo, split_of  # noqa: E402

SIZE, PER_SHARD = 32, 400
FLAGS = ["--size", str(SIZE), "--samples-per-shard", str(PER_SHARD)]
PAIRS = ("train", "test_concept", "test_combo", "test_set", "retrieval_concept", "retrieval_combo", "retrieval_set")
EMOJI = tuple(f"emoji/{prefix}" for prefix in EMOJI_SETS)
CLASSIFICATION = ("zeroshot", "zeroshot_concept", "zeroshot_emoji")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("package") / "made-up.tgz", *make_sets())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Path:
    out = tmp_path_factory.mktemp("study") / "made" / "data"
    assert build_study.main(["--out", str(out), "--package", str(package), "--workers", "2", *FLAGS]) == 0
    return out


def facts_of(folder: Path) -> list[dict]:
    """Facts, caption and picture of every sample of a split."""
    return [
        {**json.loads(sample["json"]), "caption": sample["txt"].decode(), "png": sample["png"]}
        for sample in read_split(folder).values()
    ]


@pytest.fixture(scope="module")
def icons(built: Path) -> dict[tuple[str, str], dict]:
    """Samples of all splits but the retrieval splits, by set and name."""
    found = [{**facts, "split": split} for split in (*PAIRS[:4], *EMOJI) for facts in facts_of(built / split)]
    assert len({(facts["set"], facts["name"]) for facts in found}) == len(found)
    return {(facts["set"], facts["name"]): facts for facts in found}


def test_two_builds_are_equal_byte_for_byte(built: Path, package: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert build_study.main(["--out", str(again), "--package", str(package), "--workers", "1", *FLAGS]) == 0
    assert digests(again) == digests(built)


def test_no_spelling_of_a_held_out_concept_is_trained(built: Path) -> None:
    trained = {concept_key(facts["concept"]) for facts in facts_of(built / "train")}
    held_out = facts_of(built / "test_concept")
    assert len(trained) > 100
    assert {"coral trumpet", "trumpets coral"} <= {facts["concept"] for facts in held_out}
    assert not trained & {concept_key(facts["concept"]) for facts in held_out}


def test_test_sets_are_held_out_whole(icons: dict[tuple[str, str], dict]) -> None:
    splits = {prefix: {facts["split"] for facts in icons.values() if facts["set"] == prefix} for prefix, _ in icons}
    assert splits["iconoir"] == {"test_set", "test_concept"}
    assert splits["flat-color-icons"] <= {"test_set", "test_concept"}
    assert [prefix for prefix, found in splits.items() if "test_set" in found] == ["iconoir", "flat-color-icons"]


def test_a_combination_is_trained_in_other_families_only(built: Path) -> None:
    trained = {(facts["set"], facts["concept"]) for facts in facts_of(built / "train")}
    combinations = {(facts["set"], facts["concept"]) for facts in facts_of(built / "test_combo")}
    assert len(combinations) > 10
    assert not trained & combinations
    assert {concept_key(concept) for _, concept in combinations} <= {concept_key(concept) for _, concept in trained}
    drawn_twice = {"mdi", "mdi-light"}  # by one hand
    twins = [{(other, concept) for other in drawn_twice} for prefix, concept in combinations if prefix in drawn_twice]
    assert twins
    assert all(both <= combinations for both in twins)


def test_sets_are_left_out_for_a_reason(built: Path, icons: dict[tuple[str, str], dict]) -> None:
    assert not {prefix for prefix, _ in icons} & set(DROPPED_SETS)
    dropped = json.loads((built / "manifest.json").read_text())["dropped"]
    assert {reason: count for reason, count in dropped.items() if reason.startswith("set_")} == {
        "set_license": 4,
        "set_older_version": 2,
        "set_animated": 2,
        "set_emoji_like": 2,
        "set_loose_names": 2,
        "set_logos": 4,
    }


@pytest.mark.parametrize(
    ("place", "caption"),
    [
        (("set-00", "amber-anchor"), "amber anchor icon"),
        (("flat-color-icons", "amber-anchor"), "amber anchor, color icon"),
        (("rules", "lamp-24"), "lamp icon"),
        (("rules", "lamp-24-fill"), "lamp, filled icon"),
        (("rules", "lamp-off-24"), "lamp off icon"),
        (("rules", "vase2"), "vase icon"),
        (("rules", "vase-03"), "vase icon"),
        (("rules", "vase-two"), "vase icon"),
        (("rules", "pier-4"), "pier 4 icon"),
        (("endings", "bell-outline"), "bell, outline icon"),
        (("endings", "bell-line"), "bell, line icon"),
        (("endings", "bell-old-sharp"), "bell old sharp icon"),
        (("endings", "goal-line"), "goal line icon"),
        (("endings", "moon-duotone"), "moon, duotone icon"),
        (("endings", "kite-filled-outline"), "kite, filled outline icon"),
        (("begun", "baseline-cup"), "cup, filled icon"),
        (("begun", "outline-cup"), "cup, outline icon"),
        (("begun", "cup"), "cup icon"),
        (("circle-flags", "fr"), "flag of france, circle icon"),
        (("flag", "fr-1x1"), "flag of france, square icon"),
        (("flag", "fr-4x3"), "flag of france icon"),
        (("twemoji", "turtle"), "turtle emoji"),
        (("twemoji", "flag-for-flag-france"), "flag of france emoji"),
        (("noto", "flag-for-japan"), "flag of japan emoji"),
        (("twemoji", "flag-in-hole"), "flag in hole emoji"),
        (("emojione", "direct-hit"), "bullseye emoji"),
    ],
)
def test_captions(icons: dict[tuple[str, str], dict], place: tuple[str, str], caption: str) -> None:
    assert icons[place]["caption"] == caption


@pytest.mark.parametrize(
    "place",
    [
        ("rules", "lamp-16"),  # another size
        ("rules", "lamp-16-fill"),
        ("rules", "42-7"),  # no word
        ("rules", "github-brand"),
        ("rules", "harbour"),  # a brand by its category
        ("rules", "old-lamp"),  # hidden
        ("rules", "blank"),
        ("rules", "broken"),
        ("circle-flags", "zz"),  # no country
        ("openmoji", "openmoji-nurse"),  # OpenMoji's own
        ("noto-v1", "blob"),  # in no group of Unicode
        ("twemoji", "waving-hand-light-skin-tone"),
        ("emojione", "waving-hand"),  # hidden
    ],
)
def test_icons_left_out(icons: dict[tuple[str, str], dict], place: tuple[str, str]) -> None:
    _, sets = make_sets()
    assert place[1] in sets[place[0]]["icons"]
    assert place not in icons


def test_equal_pixels_stay_once_under_the_commonest_name(icons: dict[tuple[str, str], dict]) -> None:
    assert ("set-00", "amber-anchor") in icons
    assert ("rules", "copied-anchor") not in icons
    pictures = [facts["png"] for facts in icons.values() if facts["style"] != "emoji"]
    assert len(set(pictures)) == len(pictures)


def test_facts_of_a_sample(icons: dict[tuple[str, str], dict]) -> None:
    lamp = icons["rules", "lamp-24"]
    assert lamp["aliases"] == ["bulb-24", "former-24"]
    assert lamp["category"] == "Home"
    assert (lamp["concept"], lamp["style"], lamp["license"]) == ("lamp", "", "MIT")
    assert icons["iconoir", "amber-anchor"]["license"] == "CC-BY-4.0"
    assert icons["openmoji", "bullseye"]["license"] == "CC-BY-SA-4.0"


def dark_box(png: bytes) -> tuple[int, int, int, int]:
    image = Image.open(io.BytesIO(png)).convert("L")
    return Image.eval(image, lambda value: 255 - value).getbbox()


def test_drawings_keep_their_canvas(icons: dict[tuple[str, str], dict]) -> None:
    assert dark_box(icons["rules", "wide"]["png"]) == (0, SIZE // 4, SIZE, SIZE * 3 // 4)
    assert dark_box(icons["rules", "shifted"]["png"]) == (0, 0, SIZE // 2, SIZE)


@pytest.mark.parametrize("split", [*PAIRS, *EMOJI])
def test_keys_are_dense_and_sizes_right(built: Path, split: str) -> None:
    samples = read_split(built / split)
    assert list(samples) == [f"{key:09d}" for key in range(len(samples))]
    assert [json.loads(sample["json"])["key"] for sample in samples.values()] == list(range(len(samples)))
    assert {tuple(sample) for sample in samples.values()} == {("png", "txt", "json")}
    images = [Image.open(io.BytesIO(sample["png"])) for sample in samples.values()]
    assert {(image.format, image.mode, image.size) for image in images} == {("PNG", "RGB", (SIZE, SIZE))}
    counted = {path.name: len(read_tar(path)) for path in sorted((built / split).glob("*.tar"))}
    assert json.loads((built / split / "sizes.json").read_text()) == counted
    assert all(size == PER_SHARD for size in list(counted.values())[:-1])


def test_webdataset_reads_the_shards(built: Path) -> None:
    shards = [str(path) for path in sorted((built / "train").glob("*.tar"))]
    assert len(shards) > 2
    rows = list(wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
    assert [facts["key"] for _, _, facts in rows] == list(range(len(rows)))
    assert len({facts["set"] for _, _, facts in rows[:100]}) > 10  # shuffled


@pytest.mark.parametrize("kind", ["concept", "combo", "set"])
def test_retrieval_has_one_picture_of_every_concept(built: Path, kind: str) -> None:
    test, retrieval = f"test_{kind}", f"retrieval_{kind}"
    places = [(facts["set"], facts["name"]) for facts in facts_of(built / test)]
    chosen = facts_of(built / retrieval)
    concepts = [concept_key(facts["concept"]) for facts in chosen]
    assert len(set(concepts)) == len(concepts)
    assert set(concepts) == {concept_key(facts["concept"]) for facts in facts_of(built / test)}
    assert {(facts["set"], facts["name"]) for facts in chosen} <= set(places)


@pytest.mark.parametrize("split", EMOJI)
def test_emoji_have_one_picture_of_every_name(built: Path, split: str) -> None:
    captions = [facts["caption"] for facts in facts_of(built / split)]
    assert len(set(captions)) == len(captions) >= 5


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_has_the_layout_of_clip_benchmark(
    built: Path, icons: dict[tuple[str, str], dict], name: str
) -> None:
    folder = built / name
    classes = (folder / "classnames.txt").read_text().splitlines()
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    shards = int((folder / "test" / "nshards.txt").read_text())
    assert sorted(path.name for path in (folder / "test").glob("*.tar")) == [f"{index}.tar" for index in range(shards)]
    assert all("{c}" in template for template in templates)
    assert classes == sorted(set(classes))
    samples = read_split(folder / "test")
    assert list(samples) == [f"s{index:07d}" for index in range(len(samples))]
    concepts_of: dict[bytes, set[str]] = {}
    for facts in icons.values():
        concepts_of.setdefault(facts["png"], set()).add(facts["concept"])
    assert all(classes[int(sample["cls"])] in concepts_of[sample["png"]] for sample in samples.values())
    assert len(samples) > len(classes) - 2


def test_classes(built: Path, icons: dict[tuple[str, str], dict]) -> None:
    families: dict[str, set[str]] = {}
    for facts in icons.values():
        if facts["split"] == "train":
            family = "mdi" if facts["set"].startswith("mdi") else facts["set"]
            families.setdefault(facts["concept"], set()).add(family)
    classes = {name: (built / name / "classnames.txt").read_text().splitlines() for name in CLASSIFICATION}
    assert classes["zeroshot"] == sorted(name for name, found in families.items() if len(found) >= 12)
    assert classes["zeroshot_concept"] == ["amber yacht", "azure ladder", "coral trumpet"]
    assert classes["zeroshot_emoji"] == [
        "bullseye",
        "flag in hole",
        "flag of france",
        "flag of japan",
        "grinning face",
    ]


def test_of_two_spellings_the_commoner_is_the_class() -> None:
    counts = {
        ("arrow left", "left arrow"): 13,
        ("arrow left", "arrow left"): 15,
        ("bell", "bell"): 12,
        ("cup", "cup"): 2,
    }
    assert dataset._class_names(counts, 12) == ["arrow left", "bell"]


def test_manifest_counts_what_is_there(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert set(manifest["splits"]) == {*PAIRS, *EMOJI}
    for split, counted in manifest["splits"].items():
        captions = Counter(facts["caption"] for facts in facts_of(built / split))
        assert counted["samples"] == captions.total()
        assert counted["distinct_captions"] == len(captions)
        assert counted["samples_with_repeated_caption"] == sum(count for count in captions.values() if count > 1)
        assert counted["commonest_caption"]["samples"] == max(captions.values())
    assert manifest["splits"]["test_concept"]["concepts_in_train"] == 0
    assert manifest["splits"]["test_combo"]["concepts_in_train"] == manifest["splits"]["test_combo"]["concepts"]
    assert manifest["chance"]["recall@5"]["retrieval_set"] == 5 / manifest["splits"]["retrieval_set"]["samples"]
    assert manifest["chance"]["recall@5"]["emoji/noto"] == 5 / manifest["splits"]["emoji/noto"]["samples"]
    assert manifest["chance"]["top1"]["zeroshot"] == 1 / manifest["classification"]["zeroshot"]["classes"]
    for name in CLASSIFICATION:
        assert manifest["classification"][name]["images"] == len(read_split(built / name / "test"))
    assert manifest["package"]["version"] == "0.0.1"


def test_expected_repeats_are_those_of_random_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icons.manifest.BATCH", 8)
    from icons.manifest import _expected_repeats

    counts, chance = [5, 3, 1, 1, 10], random.Random(0)
    captions = [index for index, count in enumerate(counts) for _ in range(count)]
    drawn = [chance.sample(captions, 8) for _ in range(4000)]
    repeats = [sum(batch.count(caption) - 1 for caption in batch) / 8 for batch in drawn]
    assert _expected_repeats(counts) == pytest.approx(sum(repeats) / len(repeats), rel=0.03)
    assert _expected_repeats([1]) == 0.0


def test_manifest_names_the_authors_of_every_set_in_use(built: Path, icons: dict[tuple[str, str], dict]) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert set(manifest["sets"]) == {prefix for prefix, _ in icons}
    assert manifest["sets"]["iconoir"]["author"] == "Authors of iconoir"
    assert manifest["sets"]["iconoir"]["license"] == "CC-BY-4.0"
    assert manifest["sets"]["iconoir"]["samples"]["test_set"] == sum(
        facts["set"] == "iconoir" and facts["split"] == "test_set" for facts in icons.values()
    )
    assert manifest["licenses"]["emoji/openmoji"] == {"CC-BY-SA-4.0": manifest["splits"]["emoji/openmoji"]["samples"]}


def test_a_limited_build_has_every_split_and_whole_concepts(
    icons: dict[tuple[str, str], dict], package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    assert (
        build_study.main(["--out", str(out), "--package", str(package), "--workers", "1", "--limit", "500", *FLAGS])
        == 0
    )
    kept = [facts for split in (*PAIRS[:4], *EMOJI) for facts in facts_of(out / split)]
    assert 400 < len(kept) < 800
    assert all(len(read_split(out / name)) > 0 for name in (*PAIRS, *EMOJI))
    assert all(len(read_split(out / name / "test")) > 0 for name in CLASSIFICATION)

    def counts(samples: list[dict]) -> Counter[str]:
        return Counter(concept_key(facts["concept"]) for facts in samples if facts["style"] != "emoji")

    everything = counts(list(icons.values()))
    assert all(count == everything[key] for key, count in counts(kept).items())


def test_a_finished_build_is_left_alone(
    built: Path, package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_study, "build", lambda *_: pytest.fail("built again"))
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert build_study.main(["--out", str(built), "--package", str(package), *FLAGS]) == 0
    assert "complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, capsys
) -> None:
    def render_half(*_: object) -> None:
        raise failure

    monkeypatch.setattr(dataset, "render_icons", render_half)
    flags = ["--out", str(tmp_path / "data"), "--package", str(package), "--workers", "2"]
    if isinstance(failure, OSError):
        assert build_study.main(flags) == 1
        error = capsys.readouterr().err
        assert (error[:7], "No space left" in error, error.count("\n")) == ("error: ", True, 1)
    else:
        with pytest.raises(KeyboardInterrupt):
            build_study.main(flags)
    assert list(tmp_path.iterdir()) == []


def test_workers_that_have_just_begun_can_be_ended() -> None:
    """A signal that they lost, while they were forked, would keep the builder waiting for ever."""
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(build_study.__file__).parent)!r})
        from building.folder import exit_when_told
        from building.rendering import worker_pool
        for _ in range(50):
            try:
                with exit_when_told(), worker_pool(3):
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                pass
            with worker_pool(2) as map_jobs:
                assert map_jobs(abs, [-1, 2]) == [1, 2]
    """)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_data_of_the_other_builder_is_not_replaced(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"builder_version": 1}')
    assert build_study.main(["--out", str(tmp_path), "--package", str(package)]) == 2
    assert f"--out {tmp_path} exists and is no study data" in capsys.readouterr().err
    assert manifest.read_text() == '{"builder_version": 1}'


def without(*prefixes: str) -> tuple[dict[str, dict], dict[str, dict]]:
    collections, sets = make_sets()
    kept = {prefix: facts for prefix, facts in collections.items() if prefix not in prefixes}
    return kept, sets


def test_a_package_without_test_sets_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = write_package(tmp_path / "p.tgz", *without("iconoir", "flat-color-icons"))
    assert build_study.main(["--out", str(tmp_path / "data"), "--package", str(package), "--workers", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "leaves nothing for test_set, retrieval_set, zeroshot" in lines[0]
    assert list(tmp_path.iterdir()) == [package]


def damaged(path: Path, package: Path, kind: str) -> Path:
    whole = package.read_bytes()
    if kind == "empty of sets":
        return write_package(path, {}, {})
    path.write_bytes({"no tarball": b"<html>not found</html>", "cut short": whole[: len(whole) // 2]}[kind])
    return path


@pytest.mark.parametrize("kind", ["no tarball", "cut short", "empty of sets"])
def test_a_damaged_package_gets_one_line(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    file = damaged(tmp_path / "p.tgz", package, kind)
    assert build_study.main(["--out", str(tmp_path / "data"), "--package", str(file), "--workers", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(file) in lines[0]
    assert "npm pack @iconify/json@2.2.535" in lines[0]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "8"], ["--size 8", "16"]),
        (["--limit", "0"], ["--limit 0", "1 or more"]),
        (["--package", "absent.tgz"], ["--package absent.tgz", "npm pack"]),
    ],
)
def test_mistakes_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    assert build_study.main(["--out", str(tmp_path / "data"), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in words)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_command(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        dataset.importlib.util, "find_spec", lambda name: None if name in ("resvg_py", "PIL") else real(name)
    )
    assert build_study.main(["--out", str(tmp_path / "data"), "--package", str(package)]) == 2
    assert capsys.readouterr().err.endswith("pip install resvg-py pillow\n")


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("Regular", ""),
        ("24px Solid", "filled"),
        ("Outlined", "outline"),
        ("BoldDuotone", "bold duotone"),
        ("Two Tone", "two-tone"),
        ("Sharp Filled Fill", "sharp filled"),
        ("16x16 Light", "light"),
    ],
)
def test_styles_have_one_word(text: str, style: str) -> None:
    assert style_words(text) == style


def test_the_longest_ending_counts() -> None:
    naming = Naming.of({"icons": {}, "suffixes": {"fill": "Fill", "24-fill": "24px Fill", "": "Regular"}})
    assert naming.meaning("bell-24-fill") == Meaning("bell", "filled", 24)
    assert naming.meaning("bell") == Meaning("bell", "", 0)


def test_spellings_and_sets_decide_the_split() -> None:
    assert split_of(concept_key("coral trumpet"), "iconoir", "iconoir") is Split.TEST_CONCEPT
    assert split_of(concept_key("Trumpets, coral"), "mdi", "mdi") is Split.TEST_CONCEPT
    drawn = Counter(split_of(f"name {index}", "mdi", "mdi") for index in range(20_000))
    assert drawn[Split.TEST_CONCEPT] / 20_000 == pytest.approx(0.02, abs=0.004)
    assert drawn[Split.TEST_COMBO] / 20_000 == pytest.approx(0.0245, abs=0.004)
    assert settle_combo(Split.TEST_COMBO, "cup", {"bell"}) is Split.TRAIN
    assert settle_combo(Split.TEST_COMBO, "bell", {"bell"}) is Split.TEST_COMBO


def stored(thumbnail: np.ndarray) -> Stored:
    return Stored(0, 0, "", thumbnail.astype(np.uint8).tobytes())


def test_near_duplicates_are_counted() -> None:
    """Every value differs by 3 or by 4 of 63 levels: 0.048 and 0.063 of the range."""
    rng = np.random.default_rng(0)
    train = rng.integers(0, 60, (50, 32 * 32))
    tests = [*(train[:10] + 3), *(train[10:40] + 4)]
    assert near_duplicate_share([stored(row) for row in train], [stored(row) for row in tests]) == 10 / 40


def test_thumbnails_are_those_of_the_drawing() -> None:
    data = {"icons": {"half": {"body": "<path d='M0 0h12v24H0z'/>"}}, "width": 24, "height": 24}
    made = render(Job(svg_text(data, "half"), 64))
    assert made is not None
    rows = np.frombuffer(made[1], np.uint8).reshape(32, 32)
    assert (rows[:, :16] == 0).all()
    assert (rows[:, 16:] == 63).all()


def test_the_package_is_part_of_the_options(built: Path, package: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["options"]["package"] == integrity(package) == manifest["package"]["integrity"]
