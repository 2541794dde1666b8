"""An end to waiting: with worker processes, and in the process that makes the batches itself."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from training.data.preflight import first_shards_hold
from training.data.timeout import DataTimeoutError, patient
from training.errors import OneRankError


class Slow(IterableDataset):
    """Three batches, then silence, for no longer than torch waits when the worker is let go."""

    def __iter__(self) -> Iterator[int]:
        yield from range(3)
        time.sleep(2.5)


def test_workers_that_are_silent() -> None:
    batches = patient(iter(DataLoader(Slow(), batch_size=None, num_workers=1, timeout=1)), 1, lambda: "why", 1)
    assert [int(next(batches)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataTimeoutError, match=r"no batch came for 1 s \(--data-timeout 1\)") as caught:
        next(batches)
    assert str(caught.value).endswith("why")
    assert isinstance(caught.value, OneRankError)
    caught.value.__traceback__ = None


class LateAtFirst(IterableDataset):
    """A batch after a while, and another after as long."""

    def __iter__(self) -> Iterator[int]:
        for number in range(2):
            time.sleep(2.5)
            yield number


def test_the_first_batch_may_take_longer() -> None:
    """As where an epoch goes on and what is passed over has to be read."""
    loader = iter(DataLoader(LateAtFirst(), batch_size=None, num_workers=1, timeout=1))
    batches = patient(loader, 1, lambda: "why", 1, first=10)
    assert int(next(batches)) == 0
    with pytest.raises(DataTimeoutError) as caught:
        next(batches)
    caught.value.__traceback__ = None

    gave_up = []

    def slowly() -> Iterator[int]:
        time.sleep(0.6)
        yield 0
        time.sleep(0.6)
        yield 1

    mine = patient(slowly(), 0.2, lambda: "why", 0, gave_up.append, first=10)
    assert next(mine) == 0
    assert gave_up == []
    assert next(mine) == 1
    assert len(gave_up) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_and_other_errors_come_as_they_are(workers: int) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise RuntimeError("DataLoader worker (pid 3) exited unexpectedly")

    batches = patient(failing(), 30, lambda: "why", workers)
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match="exited unexpectedly") as caught:
        next(batches)
    assert not isinstance(caught.value, DataTimeoutError)
    assert list(patient(iter(range(100)), 30, lambda: "why", workers)) == list(range(100))


def held_up(folder: str) -> None:
    """Runs in a process of its own: the third batch is held up in a read of a pipe to which nobody writes."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")

    def batches() -> Iterator[int]:
        yield 1
        yield 2
        os.read(os.pipe()[0], 1)

    def explain() -> str:
        raise ValueError("no reason known")

    for number in patient(batches(), 0.4, explain, 0):
        print(number, flush=True)
        # What is done between batches does not count.
        time.sleep(0.7)


def test_a_process_that_makes_its_own_batches_ends(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=held_up, args=(str(tmp_path),))
    process.start()
    process.join(30)
    assert process.exitcode == 1
    assert (tmp_path / "stdout").read_text().split() == ["1", "2"]
    said = (tmp_path / "stderr").read_text()
    assert said.startswith("error: no batch came for 0.4 s (--data-timeout 0.4)")
    assert "ValueError: no reason known" in said


def test_random_numbers_are_drawn_as_without(kit, tmp_path: Path) -> None:
    """The batches are still made in the calling thread."""
    kit.write_shards(tmp_path, [16])

    def draws(watched: bool) -> list[float]:
        torch.default_generator.manual_seed(0)
        found = []
        batches = kit.open_ranks(kit.config(tmp_path), 1, kit.noisy_preprocess)[0].epoch(0)
        for batch in patient(batches, 60, lambda: "", 0) if watched else batches:
            found += [torch.rand(()).item(), batch.image.sum().item()]
        return found

    assert draws(True) == draws(False)
    assert len(draws(True)) == 8


def test_what_the_first_shards_hold(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [4] * 5)
    kit.write_tar(tmp_path / "00000.tar", [kit.members_of(0)[1:], kit.members_of(1)])
    (tmp_path / "00001.tar").write_bytes(b"nothing")
    lines = first_shards_hold(kit.config(tmp_path)).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("00000.tar: its first 2 samples hold .json, .png, .txt; 1 left out: no image")
    assert "00001.tar: its first 0 samples hold nothing; shard is not a tar file" in lines[1]
    assert lines[2].endswith("00002.tar: its first 4 samples hold .json, .png, .txt")


def test_looking_into_shards_never_fails_and_takes_no_longer_than_allowed(kit, tmp_path: Path) -> None:
    assert "no shard matches" in first_shards_hold(kit.config(tmp_path / "gone"))
    assert "synthetic" in first_shards_hold(kit.config(None, dataset_type="synthetic"))
    assert "csv" in first_shards_hold(kit.config("rows.csv"))
    start = time.monotonic()
    held = first_shards_hold(kit.config("pipe:sleep 2.5 # x.tar"), seconds=0.3)
    assert time.monotonic() - start < 2
    assert held == "pipe:sleep 2.5 # x.tar could not be read within 0.3 s"
