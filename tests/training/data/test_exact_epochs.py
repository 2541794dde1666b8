"""Epochs from shards of known sizes, through real loaders and worker processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from training.data import Batch, build_train_loader


@pytest.mark.parametrize(
    ("world", "workers", "sizes", "batch"),
    [
        (1, 0, [10, 10, 12], 4),  # divisible
        (2, 0, [7, 19, 3, 11], 4),  # uneven, one short of divisible by far
        (2, 2, [40], 5),  # one shard for four consumers
        (3, 2, [13, 1, 30], 4),  # fewer shards than consumers, 44 = 3 * 12 + 8
        (1, 3, [5, 6, 7, 8, 9, 1, 2], 3),  # more shards than consumers, two left out
        (2, 4, [9, 9], 3),  # more workers than steps
    ],
)
def test_every_sample_once(kit, tmp_path: Path, world: int, workers: int, sizes: list[int], batch: int) -> None:
    kit.write_shards(tmp_path, sizes)
    config = kit.config(tmp_path, workers=workers, batch_size=batch)
    loaders = kit.open_ranks(config, world)
    steps = sum(sizes) // (batch * world)
    assert [loader.steps_per_epoch for loader in loaders] == [steps] * world
    assert [loader.num_samples for loader in loaders] == [steps * batch * world] * world
    epochs = []
    for epoch in (0, 1):
        ranks = [kit.seen_keys(loader, epoch) for loader in loaders]
        assert [len(keys) for keys in ranks] == [steps * batch] * world
        keys = [key for rank in ranks for key in rank]
        assert len(set(keys)) == len(keys)
        assert set(keys) <= set(range(sum(sizes)))
        assert sum(sizes) - len(keys) < batch * world
        epochs.append(keys)
    assert epochs[0] != epochs[1]


def batches(loader, epoch: int) -> list[Batch]:
    return [Batch(*(part.clone() for part in batch)) for batch in loader.epoch(epoch)]


def same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) for one, other in zip(some, others) for a, b in zip(one, other)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_a_function_of_seed_and_number(kit, tmp_path: Path, workers: int) -> None:
    kit.write_shards(tmp_path, [17, 16, 20])
    config = kit.config(tmp_path, workers=workers, seed=5)
    arriving, direct = (kit.open_ranks(config, 1, kit.noisy_preprocess)[0] for _ in range(2))
    history = []
    for epoch in range(3):
        history.append(batches(arriving, epoch))
        torch.rand(7)  # What the training process draws must not matter, with workers=0 least of all.
    assert same(batches(direct, 2), history[2])
    assert same(batches(direct, 0), history[0])
    assert not same(history[0], history[1])
    config.seed = 6
    assert not same(batches(kit.open_ranks(config, 1, kit.noisy_preprocess)[0], 0), history[0])


def test_an_epoch_left_early_does_not_leak_into_the_next(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [40, 40])
    loader = kit.open_ranks(kit.config(tmp_path, workers=2), 1)[0]
    whole = kit.seen_keys(loader, 1)
    for _, _batch in zip(range(3), loader.epoch(0)):
        pass
    assert kit.seen_keys(loader, 1) == whole


def test_loading_leaves_the_random_state_of_the_process_alone(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [16])
    loader = kit.open_ranks(kit.config(tmp_path), 1, kit.noisy_preprocess)[0]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    batches(loader, 0)
    assert torch.equal(torch.rand(4), expected)


def test_each_consumer_augments_differently(kit, tmp_path: Path) -> None:
    # Many copies of one sample: what differs between batches is the augmentation.
    kit.write_tar(tmp_path / "0.tar", ([(f"{i}.png", kit.image_bytes(8)), (f"{i}.txt", b"8")] for i in range(32)))
    loaders = kit.open_ranks(kit.config(tmp_path, workers=2, needs_keys=False), 2, kit.noisy_preprocess)
    values = [
        value for epoch in (0, 1) for loader in loaders for b in loader.epoch(epoch) for value in b.image[:, 2, 0, 0]
    ]
    assert len({round(float(value), 6) for value in values}) == len(values) == 64


def test_fewer_samples_than_there_are(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [30, 30])
    loader = kit.open_ranks(kit.config(tmp_path, train_num_samples=21), 1)[0]
    epochs = [kit.seen_keys(loader, epoch) for epoch in range(6)]
    assert all(len(set(keys)) == 20 for keys in epochs)
    assert len({key for keys in epochs for key in keys}) > 40


def test_samples_are_mixed_within_a_worker(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [100])
    loader = kit.open_ranks(kit.config(tmp_path, shuffle_buffer=50), 1)[0]
    keys = kit.seen_keys(loader, 0)
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(keys))
    assert neighbours < 20
    unshuffled = kit.seen_keys(kit.open_ranks(kit.config(tmp_path, shuffle_buffer=0), 1)[0], 0)
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(unshuffled)) > 90


def test_sizes_file_is_believed_where_it_is(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [12, 12])
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 8}))
    loader = kit.open_ranks(kit.config(tmp_path), 1)[0]
    assert loader.num_samples == 20
    assert "20 (from sizes.json and tar headers)" in loader.data_description
    assert "none twice" in loader.data_description
    assert set(kit.seen_keys(loader, 0)) == set(range(8)) | set(range(12, 24))


def test_pipes_and_patterns(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [6, 7, 8])
    url = f"pipe:cat {tmp_path}/{{00000..00001}}.tar::{tmp_path}/00002.tar"
    config = kit.config(url, train_num_samples=84, batch_size=3, needs_keys=True)
    loader = kit.open_ranks(config, 1)[0]
    assert "unknown" in loader.data_description
    assert set(kit.seen_keys(loader, 0)) == set(range(21))


def test_keys_are_none_where_a_sample_has_none(kit, tmp_path: Path) -> None:
    samples = [kit.members_of(number) for number in range(8)]
    samples[3] = samples[3][:2]
    kit.write_tar(tmp_path / "0.tar", samples)
    config = kit.config(tmp_path, batch_size=8, needs_keys=False)
    assert next(kit.open_ranks(config, 1)[0].epoch(0)).keys is None


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_pinned_batches_keep_their_form(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [8])
    config = kit.config(tmp_path, workers=1)
    loader = build_train_loader(config, kit.plain_preprocess, kit.tokenize, 0, 1, pin_memory=True)
    for batch in loader.epoch(0):
        assert isinstance(batch, Batch)
        assert batch.keys is not None


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal does not show on this system")
def test_workers_outlive_signals_that_the_whole_job_gets(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [60])
    loader = kit.open_ranks(kit.config(tmp_path, workers=1), 1)[0]
    others = set(multiprocessing.active_children())
    epoch = loader.epoch(0)
    next(epoch)
    (worker,) = set(multiprocessing.active_children()) - others
    for name in ("TERM", "USR1", "USR2", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(epoch)) == 14
    assert len(kit.seen_keys(loader, 1)) == 60
    worker.terminate()  # From the parent: this one counts.
    worker.join(timeout=10)
    assert worker.exitcode == 0
