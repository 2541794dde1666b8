"""Samples and shards that fail in the middle of a run."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from training.data import NoUsableSamplesError, build_train_loader
from training.data.samples import Tally, parse_key


def damage(members: list[tuple[str, bytes]], how: str) -> list[tuple[str, bytes]]:
    (image, pixels), (text, caption), (key, number) = members
    return {
        "no image": [(text, caption), (key, number)],
        "image cannot be decoded": [(image, pixels[:40]), (text, caption), (key, number)],
        "no caption": [(image, pixels), (key, number)],
        "caption is not utf-8": [(image, pixels), (text, b"\xff\xfe 3"), (key, number)],
        "no integer key": [(image, pixels), (text, caption), (key, b'{"key": "x1"}')],
    }[how]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "how", ["no image", "image cannot be decoded", "no caption", "caption is not utf-8", "no integer key"]
)
def test_broken_samples_are_made_up_for(kit, tmp_path: Path, how: str, workers: int, caplog) -> None:
    broken = {3, 4, 11, 17}
    samples = [kit.members_of(number) for number in range(24)]
    kit.write_tar(tmp_path / "0.tar", [damage(s, how) if i in broken else s for i, s in enumerate(samples)])
    config = kit.config(tmp_path, workers=workers)
    with caplog.at_level(logging.WARNING):
        loader = kit.open_ranks(config, 1)[0]
        assert loader.steps_per_epoch == 6
        counts = Counter(kit.seen_keys(loader, 0))
    assert set(counts) == set(range(24)) - broken
    assert counts.total() == 24
    if workers == 0:
        assert how in caplog.text
    assert kit.seen_keys(loader, 1) == kit.seen_keys(kit.open_ranks(config, 1)[0], 1)


def test_keyless_samples_are_fine_unless_keys_are_needed(kit, tmp_path: Path) -> None:
    samples = [damage(kit.members_of(number), "no integer key") for number in range(8)]
    kit.write_tar(tmp_path / "0.tar", samples)
    loader = kit.open_ranks(kit.config(tmp_path, needs_keys=False), 1)[0]
    assert sorted(n for batch in loader.epoch(0) for n in batch.text[:, 0].tolist()) == list(range(8))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_is_an_error_and_no_hang(
    kit, tmp_path: Path, workers: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr("training.data.sizes.COUNTED_BYTES", 0)
    kit.write_tar(tmp_path / "0.tar", [damage(kit.members_of(i), "no caption") for i in range(16)])
    loader = kit.open_ranks(kit.config(tmp_path, workers=workers, train_num_samples=16), 1)[0]
    with pytest.raises(NoUsableSamplesError, match=r"0\.tar.*no caption") as caught:
        list(loader.epoch(0))
    # A traceback in a cycle keeps the loader for the garbage collector, in which torch takes 5 s to join each worker.
    caught.value.__traceback__ = None
    del caught


@pytest.mark.parametrize("resampled", [True, False])
@pytest.mark.usefixtures("sizes_unknown")
def test_bad_shards_are_left_out(kit, tmp_path: Path, resampled: bool, caplog) -> None:
    kit.write_shards(tmp_path, [8, 8, 8])
    (tmp_path / "00001.tar").write_bytes(b"<html>404</html>" * 100)
    whole = (tmp_path / "00002.tar").read_bytes()
    # Cut in the middle of the first member of sample 20: 16 to 19 remain.
    (tmp_path / "00002.tar").write_bytes(whole[: 4 * 6 * 512 + 512 + 20])
    config = kit.config(tmp_path, train_num_samples=120, dataset_resampled=resampled)
    loader = kit.open_ranks(config, 1)[0]
    with caplog.at_level(logging.WARNING):
        assert set(kit.seen_keys(loader, 0)) == set(range(8)) | set(range(16, 20))
    assert "00001.tar" in caplog.text
    assert "00002.tar" in caplog.text


def test_a_shard_cut_after_planning(kit, tmp_path: Path, caplog) -> None:
    kit.write_shards(tmp_path, [40])
    (tmp_path / "sizes.json").write_text('{"00000.tar": 40}')
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[: 10 * 6 * 512 + 700])
    # Most consumers' ranges are gone altogether; they go on with what is left elsewhere.
    for loader in kit.open_ranks(kit.config(tmp_path, workers=0, batch_size=2), 4):
        assert set(kit.seen_keys(loader, 0)) <= set(range(10))
    assert "ends after" in caplog.text


def test_a_mistake_in_the_transforms_is_not_taken_for_broken_samples(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [8])

    def wrong(image: object) -> None:
        raise TypeError("wrong transform")

    with pytest.raises(TypeError, match="wrong transform"):
        list(build_train_loader(kit.config(tmp_path), wrong, kit.tokenize, 0, 1, False).epoch(0))


def test_warnings_are_bounded(caplog) -> None:
    tally = Tally()
    for number in range(1000):
        tally.skip("no image", f"s{number}")
        tally.damaged(f"{number % 500}.tar", "is gone")
    messages = [record.getMessage() for record in caplog.records]
    assert sum("skipped" in message for message in messages) == 10
    assert sum("is gone" in message for message in messages) == 100
    assert tally.skipped["no image"] == 1000


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (b'{"key": 17}', 17),
        (b'{"key": "000000017"}', 17),
        (b'{"key": 0}', 0),
        (b'{"key": 9223372036854775807}', 2**63 - 1),
        (b'{"key": 9223372036854775808}', None),
        (b'{"key": -1}', None),
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
