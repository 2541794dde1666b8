"""Shards whose sizes nobody knows, and shards drawn with replacement."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from training.errors import UserError


@pytest.mark.usefixtures("sizes_unknown")
@pytest.mark.parametrize(
    ("world", "workers", "sizes"),
    [(1, 0, [9, 12, 11]), (2, 2, [8] * 8), (2, 2, [32]), (2, 0, [16, 16])],
)
def test_quota_is_filled_and_data_covered(kit, tmp_path: Path, world: int, workers: int, sizes: list[int]) -> None:
    kit.write_shards(tmp_path, sizes)
    total = sum(sizes)
    config = kit.config(tmp_path, workers=workers, train_num_samples=2 * total)
    loaders = kit.open_ranks(config, world)
    assert "some samples may come twice" in loaders[0].data_description
    ranks = [kit.seen_keys(loader, 0) for loader in loaders]
    assert [len(keys) for keys in ranks] == [2 * total // world] * world
    assert Counter(key for keys in ranks for key in keys) == dict.fromkeys(range(total), 2)


@pytest.mark.usefixtures("sizes_unknown")
def test_epochs_are_deterministic_and_differ(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [5, 6, 7, 8])
    config = kit.config(tmp_path, train_num_samples=24)
    loader = kit.open_ranks(config, 1)[0]
    history = [kit.seen_keys(loader, epoch) for epoch in range(3)]
    assert history[0] != history[1]
    assert kit.seen_keys(kit.open_ranks(config, 1)[0], 2) == history[2]


@pytest.mark.usefixtures("sizes_unknown")
def test_number_of_samples_is_needed(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [8, 8])
    with pytest.raises(UserError, match="--train-num-samples is missing"):
        kit.open_ranks(kit.config(tmp_path), 1)
    (tmp_path / "__len__").write_text("16\n")
    loader = kit.open_ranks(kit.config(tmp_path), 1)[0]
    assert loader.num_samples == 16
    assert "16 (from __len__)" in loader.data_description
    # The total of a folder says nothing about a part of it.
    with pytest.raises(UserError, match="--train-num-samples is missing"):
        kit.open_ranks(kit.config(tmp_path / "00000.tar"), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_resampled_epochs(kit, tmp_path: Path, workers: int) -> None:
    kit.write_shards(tmp_path, [5] * 6)
    config = kit.config(tmp_path, workers=workers, dataset_resampled=True, train_num_samples=128)
    ranks = kit.open_ranks(config, 2)
    assert "with replacement" in ranks[0].data_description
    first, second = (kit.seen_keys(loader, 0) for loader in ranks)
    assert len(first) == len(second) == 64
    assert first != second
    assert first != kit.seen_keys(ranks[0], 1)
    assert kit.seen_keys(kit.open_ranks(config, 2)[1], 0) == second


def test_upsampling_factors_reach_the_batches(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path / "a", [2] * 10)
    kit.write_shards(tmp_path / "b", [2] * 10, first=1000)
    config = kit.config(
        f"{tmp_path}/a::{tmp_path}/b/{{00000..00009}}.tar",
        dataset_resampled=True,
        train_data_upsampling_factors="1::3",
        train_num_samples=1000,
        shuffle_buffer=10,
    )
    keys = kit.seen_keys(kit.open_ranks(config, 1)[0], 0)
    assert sum(key >= 1000 for key in keys) / len(keys) == pytest.approx(0.75, abs=0.1)
