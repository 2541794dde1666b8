"""Samples and shards that fail in the middle of a run."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import ImageFile

from training.data import NoUsableSamplesError, TrainLoader, build_train_loader, check_train_data
from training.data.keys import read_shard_keys
from training.data.samples import (
    BrokenSampleError,
    Counts,
    Problem,
    RawSample,
    Tally,
    from_members,
    parse_key,
    read_labels,
)
from training.data.verify import BAD_FACTS, BAD_KEY, verify_shard

SRC = Path(__file__).resolve().parents[3] / "src"
# The beginning of what a decoder would go on with.
PIXELS = struct.pack(">I", 16) + b"IDAT" + bytes(16)


def bomb(side: int = 20_000) -> bytes:
    """A PNG whose header promises side × side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + PIXELS


def damage(members: list[tuple[str, bytes]], how: str) -> list[tuple[str, bytes]]:
    (image, pixels), (text, caption), (key, number) = members
    return {
        Problem.NO_IMAGE: [(text, caption), (key, number)],
        Problem.EMPTY_IMAGE: [(image, b""), (text, caption), (key, number)],
        Problem.BAD_IMAGE: [(image, pixels[:40]), (text, caption), (key, number)],
        "text named as an image": [(image, b"404 not found"), (text, caption), (key, number)],
        "PostScript named as an image": [(image, b"%!PS-Adobe-3.0 EPSF-3.0\n"), (text, caption), (key, number)],
        Problem.HUGE_IMAGE: [(image, bomb()), (text, caption), (key, number)],
        Problem.NO_CAPTION: [(image, pixels), (key, number)],
        Problem.EMPTY_CAPTION: [(image, pixels), (text, b" \r\n"), (key, number)],
        Problem.BAD_CAPTION: [(image, pixels), (text, b"\xff\xfe 3"), (key, number)],
        Problem.LONG_CAPTION: [(image, pixels), (text, caption * 10_000), (key, number)],
        "a word without end": [(image, pixels), (text, caption + b"x" * 5000), (key, number)],
        Problem.NO_KEY: [(image, pixels), (text, caption), (key, b'{"key": "x1"}')],
        "a key of thousands of digits": [(image, pixels), (text, caption), (key, b'{"key": ' + b"7" * 5000 + b"}")],
        "such a key as text": [(image, pixels), (text, caption), (key, b'{"key": "' + b"7" * 5000 + b'"}')],
        "json too deep": [(image, pixels), (text, caption), (key, b"[" * 100_000)],
        Problem.TWICE: [(image, pixels), (text, caption), (key, number), (key, number)],
        "half a character": [(image, pixels), (key, b'{"caption": "a \\ud800", "key": 3}')],
    }[how]


# What the cases that are not named for it are counted as.
KINDS = {
    "text named as an image": Problem.BAD_IMAGE,
    "PostScript named as an image": Problem.BAD_IMAGE,
    "a word without end": Problem.LONG_CAPTION,
    "a key of thousands of digits": Problem.NO_KEY,
    "such a key as text": Problem.NO_KEY,
    "json too deep": Problem.NO_KEY,
    "half a character": Problem.BAD_CAPTION,
}
CASES = [
    *(Problem.NO_IMAGE, Problem.EMPTY_IMAGE, Problem.BAD_IMAGE, Problem.HUGE_IMAGE, Problem.NO_CAPTION, Problem.TWICE),
    *(Problem.EMPTY_CAPTION, Problem.BAD_CAPTION, Problem.LONG_CAPTION, Problem.NO_KEY),
    *KINDS,
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", CASES)
def test_broken_samples_are_made_up_for_and_counted(kit, tmp_path: Path, how: str, workers: int) -> None:
    broken = {3, 4, 11, 17}
    samples = [kit.members_of(number) for number in range(24)]
    kit.write_tar(tmp_path / "0.tar", [damage(s, how) if i in broken else s for i, s in enumerate(samples)])
    config = kit.config(tmp_path, workers=workers)
    loader = kit.open_ranks(config, 1)[0]
    assert loader.steps_per_epoch == 6
    keys = Counter(kit.seen_keys(loader, 0))
    assert set(keys) == set(range(24)) - broken
    assert keys.total() == 24
    if workers == 0:
        tally = loader.counts(loader.steps_per_epoch)
        assert tally.problems.keys() == {(KINDS.get(how, how), str(tmp_path / "0.tar"))}
    assert kit.seen_keys(loader, 1) == kit.seen_keys(kit.open_ranks(config, 1)[0], 1)


def harmed(shard: bytes, how: str) -> bytes:
    """A shard of 8 samples of 6 blocks of 512 bytes each, in which samples 4 and 5, or all from 4 on, are damaged."""
    header = 4 * 6 * 512
    return {
        "whole": shard,
        "header of an image flipped": shard[:header] + b"\x01" + shard[header + 1 :],
        "cut inside an image": shard[: header + 520],
        "cut inside a json": shard[: header + 5 * 512 + 3],
        "no end": shard[: 8 * 6 * 512],
        "joined": shard[:header] + bytes(1024) + shard[header:],
        "size too large": shard[: header + 124] + b"77777777777" + shard[header + 135 :],
        "zeros over a header": shard[:header] + bytes(512) + shard[header + 512 :],
        "gz": gzip.compress(shard),
        "gz cut": gzip.compress(shard, 0)[: header + 600],
        "gz named tar": gzip.compress(shard),
        "no tar": b"<html>404</html>" * 100,
        "no sample": bytes(10_240),
        "no bytes": b"",
    }[how]


HARMS = [
    *(
        "whole",
        "header of an image flipped",
        "cut inside an image",
        "cut inside a json",
        "no end",
        "joined",
        "size too large",
    ),
    *("zeros over a header", "gz", "gz cut", "gz named tar", "no tar", "no sample", "no bytes"),
]


@pytest.mark.parametrize("how", CASES)
def test_verifying_agrees_with_the_loader_on_samples(kit, tmp_path: Path, how: str) -> None:
    """--verify finds the same samples whole, and counts the same kinds, with and without keys."""
    broken = {1, 4, 5}
    members = [damage(kit.members_of(i), how) if i in broken else kit.members_of(i) for i in range(8)]
    path = kit.write_tar(tmp_path / "0.tar", members)
    report, keys = verify_shard(str(path), decode_images=True)
    loader = kit.open_ranks(kit.config(tmp_path, batch_size=1), 1)[0]
    good = set(kit.seen_keys(loader, 0))
    assert report.samples == 8
    assert good <= set(keys.tolist())
    kinds = {BAD_FACTS: Problem.NO_KEY, BAD_KEY: Problem.NO_KEY}
    # The loader tells why a sample is left out; that its keys are bad as well is of no concern to it.
    told = {kinds.get(kind, kind) for kind in report.problems}
    assert KINDS.get(how, how) in told
    assert {kind for kind, _ in problems_of(loader)} <= told
    assert len(report.examples) == min(report.problems.total(), 5)
    keyless = kit.open_ranks(kit.config(tmp_path, batch_size=1, needs_keys=False), 1)[0]
    assert report.pairs == len({batch.text[0, 0].item() for batch in keyless.epoch(0)})
    assert len(good) == 5


@pytest.mark.parametrize("how", HARMS)
@pytest.mark.usefixtures("sizes_unknown")
def test_verifying_agrees_with_the_loader_on_shards(kit, tmp_path: Path, how: str) -> None:
    """The same samples, the same kinds of damage; and the keys that are read by headers alone are those samples'."""
    kit.write_shards(tmp_path, [8], first=100)
    path = kit.write_shards(tmp_path / "harmed", [8])[0]
    shard = harmed(path.read_bytes(), how)
    path = path.rename(tmp_path / ("1.tar.gz" if how in ("gz", "gz cut") else "1.tar"))
    path.write_bytes(shard)
    report, keys = verify_shard(str(path), decode_images=True)
    config = kit.config(f"{tmp_path}/00000.tar::{path}", batch_size=1, train_num_samples=32)
    loader = kit.open_ranks(config, 1)[0]
    good = set(kit.seen_keys(loader, 0)) - set(range(100, 108))
    assert len(good) == report.samples - report.problems.total()
    assert good <= set(keys.tolist())
    # A shard without any sample is no damage for the one, and nothing to train on for the other.
    told = {kind for kind, shard in problems_of(loader) if shard == path.name} - {Problem.EMPTY}
    assert told == {line.split(":")[0] for line in report.damage} | report.problems.keys()
    counted = read_shard_keys(str(path))
    if counted.damage is None:
        assert counted.keys.tolist() == keys.tolist() == sorted(good)
        assert not report.damage
    else:
        assert report.damage


def test_keyless_samples_are_fine_unless_keys_are_needed(kit, tmp_path: Path) -> None:
    samples = [damage(kit.members_of(number), Problem.NO_KEY) for number in range(8)]
    kit.write_tar(tmp_path / "0.tar", samples)
    loader = kit.open_ranks(kit.config(tmp_path, needs_keys=False), 1)[0]
    assert sorted(n for batch in loader.epoch(0) for n in batch.text[:, 0].tolist()) == list(range(8))


def test_captions_in_json_and_suffixes_that_are_wrong(kit, tmp_path: Path) -> None:
    samples = []
    for number in range(8):
        facts = {"caption": f"picture {number}", "key": number}
        samples.append([(f"{number}.jpg", kit.image_bytes(number)), (f"{number}.json", json.dumps(facts).encode())])
    kit.write_tar(tmp_path / "0.tar", samples)
    check_train_data(kit.config(tmp_path))
    assert sorted(kit.seen_keys(kit.open_ranks(kit.config(tmp_path), 1)[0], 0)) == list(range(8))


@pytest.mark.parametrize(
    ("caption", "text", "found"),
    [(b"a", None, "a"), (None, {"caption": "b"}, "b"), (b"a", {"caption": "b"}, "a"), (b"", {"caption": "b"}, None)]
    + [(None, {"caption": wrong}, None) for wrong in (3, None, ["b"], "", " ")],
)
def test_where_captions_come_from(caption: bytes | None, text: object, found: str | None) -> None:
    members = {"png": b"x"} | ({"txt": caption} if caption is not None else {})
    members |= {"json": json.dumps(text).encode()} if text is not None else {}
    raw = from_members(members, "0", "0.tar")
    if found is None:
        with pytest.raises(BrokenSampleError, match="caption"):
            read_labels(raw, False)
    else:
        assert read_labels(raw, False) == (found, None)


def test_long_captions_of_ordinary_words_are_fine() -> None:
    caption = b"a word " * 9000
    assert read_labels(RawSample(b"x", caption, None, "0"), False)[0] == caption.decode()


def test_no_word_of_pillow_about_too_many_pixels(tmp_path: Path) -> None:
    """Neither where it warns nor where it raises; in a process of its own, as pytest has its own filters of warnings."""
    program = """
import sys
from training.data.pictures import WholePictures
from training.data.samples import BrokenSampleError
for path in sys.argv[1:]:
    try:
        WholePictures(None).decode(path)
    except BrokenSampleError as error:
        print(error)
"""
    for side in (10_000, 50_000):
        (tmp_path / f"{side}.png").write_bytes(bomb(side))
    paths = sorted(map(str, tmp_path.iterdir()))
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", program, *paths], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [Problem.HUGE_IMAGE] * 2, done.stderr
    assert "pixels" not in done.stderr


def test_half_a_picture_is_not_filled_up() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_is_an_error_and_no_hang(
    kit, tmp_path: Path, workers: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr("training.data.sizes.COUNTED_BYTES", 0)
    kit.write_tar(tmp_path / "0.tar", [damage(kit.members_of(i), Problem.NO_CAPTION) for i in range(16)])
    loader = kit.open_ranks(kit.config(tmp_path, workers=workers, train_num_samples=16), 1)[0]
    with pytest.raises(NoUsableSamplesError, match=r"0\.tar.*no caption") as caught:
        list(loader.epoch(0))
    # A traceback in a cycle keeps the loader for the garbage collector, in which torch takes 5 s to join each worker.
    caught.value.__traceback__ = None
    del caught


def problems_of(loader: TrainLoader) -> dict[tuple[str, str], int]:
    """What the loader of this process has counted, by kind and name of the shard."""
    counts = loader.counts(loader.steps_per_epoch)
    return {(kind, Path(shard).name): number for (kind, shard), number in counts.problems.items()}


@pytest.mark.parametrize("resampled", [True, False])
@pytest.mark.usefixtures("sizes_unknown")
def test_bad_shards_are_left_out(kit, tmp_path: Path, resampled: bool) -> None:
    kit.write_shards(tmp_path, [8, 8, 8])
    (tmp_path / "00001.tar").write_bytes(b"<html>404</html>" * 100)
    whole = (tmp_path / "00002.tar").read_bytes()
    # Cut in the middle of the first member of sample 20: 16 to 19 remain.
    (tmp_path / "00002.tar").write_bytes(whole[: 4 * 6 * 512 + 512 + 20])
    config = kit.config(tmp_path, train_num_samples=120, dataset_resampled=resampled)
    loader = kit.open_ranks(config, 1)[0]
    assert set(kit.seen_keys(loader, 0)) == set(range(8)) | set(range(16, 20))
    assert problems_of(loader).keys() == {(Problem.NOT_TAR, "00001.tar"), (Problem.TRUNCATED, "00002.tar")}


def test_a_shard_cut_after_planning(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [40])
    (tmp_path / "sizes.json").write_text('{"00000.tar": 40}')
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[: 10 * 6 * 512 + 700])
    # Most consumers' ranges are gone altogether; they go on with what is left elsewhere.
    for loader in kit.open_ranks(kit.config(tmp_path, workers=0, batch_size=2), 4):
        assert set(kit.seen_keys(loader, 0)) <= set(range(10))
        assert problems_of(loader).keys() == {(Problem.TRUNCATED, "00000.tar")}


@pytest.mark.parametrize("harm", ["gone", "a folder", "empty"])
def test_a_shard_that_changes_after_planning(kit, tmp_path: Path, harm: str) -> None:
    paths = kit.write_shards(tmp_path, [8, 8])
    loader = kit.open_ranks(kit.config(tmp_path), 1)[0]
    paths[1].unlink()
    if harm == "a folder":
        paths[1].mkdir()
    elif harm == "empty":
        kit.write_tar(paths[1], [])
    assert set(kit.seen_keys(loader, 0)) == set(range(8))
    kind = {"gone": Problem.GONE, "a folder": Problem.UNREADABLE, "empty": Problem.EMPTY}[harm]
    assert problems_of(loader).keys() == {(kind, "00001.tar")}


def test_a_mistake_in_the_transforms_is_not_taken_for_broken_samples(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [8])

    def wrong(image: object) -> None:
        raise TypeError("wrong transform")

    with pytest.raises(TypeError, match="wrong transform"):
        list(build_train_loader(kit.config(tmp_path), wrong, kit.tokenize, 0, 1, False).epoch(0))


def test_a_tally_counts_by_kind_and_shard() -> None:
    tally = Tally()
    tally.good += 3
    for number in range(5):
        tally.skip(Problem.NO_IMAGE, RawSample(None, None, None, f"sample {number}", f"{number % 2}.tar"))
    assert tally.drain() == Counts(
        3, {(Problem.NO_IMAGE, "0.tar"): 3, (Problem.NO_IMAGE, "1.tar"): 2}, "sample 4: no image"
    )
    assert tally.drain() == Counts(0, {}, "")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (b'{"key": 17}', 17),
        (b'{"key": "000000017"}', 17),
        (b'{"key": 0}', 0),
        (b'{"key": 9223372036854775807}', 2**63 - 1),
        (b'{"key": 9223372036854775808}', None),
        (b'{"key": -1}', None),
        (b'{"key": "' + b"0" * 90 + b'17"}', 17),
        (b'{"key": true}', None),
        (b'{"key": 1.0}', None),
        (b'{"key": "abc"}', None),
        (b'{"id": 3}', None),
        (b"[3]", None),
        (b"\xff", None),
        (None, None),
    ],
)
def test_parse_key(text: bytes | None, key: int | None) -> None:
    assert parse_key(text) == key
