"""An epoch that is broken off and goes on under the same layout is, bit for bit, the uninterrupted one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from training.data import Batch, DataConfig, TrainLoader, build_train_loader
from training.data.plan import ShardSlice
from training.data.read import read_slots
from training.data.samples import RawSample
from training.data.stages import StageClock

EPOCH = 3


def batches(loader: TrainLoader, epoch: int, steps: int | None = None) -> list[Batch]:
    found = []
    for batch in loader.epoch(epoch):
        found.append(Batch(*(None if part is None else part.clone() for part in batch)))
        if len(found) == steps:
            break
    return found


def same(some: Sequence[Batch], others: Sequence[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) for one, other in zip(some, others) for a, b in zip(one, other)
    )


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save({"data": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["data"]


def state_after(loaders: Sequence[TrainLoader], step: int) -> dict[str, Any]:
    return through_a_file(loaders[-1].state(torch.stack([loader.place(step) for loader in loaders]), step))


def broken(kit, number: int) -> list[tuple[str, bytes]]:
    """Whole but for its picture, which only decoding shows."""
    members = kit.members_of(number)
    return [(members[0][0], members[0][1][:40]), *members[1:]]


def write_damaged(kit, folder: Path, sizes: Sequence[int], is_broken: Callable[[int], bool]) -> Path:
    first = 0
    for index, size in enumerate(sizes):
        numbers = range(first, first + size)
        members = (broken(kit, n) if is_broken(n) else kit.members_of(n) for n in numbers)
        kit.write_tar(folder / f"{index:05d}.tar", members)
        first += size
    return folder


def write_csv(kit, folder: Path, rows: int) -> Path:
    lines = ["filepath\ttitle"]
    for number in range(rows):
        (folder / f"{number}.png").write_bytes(kit.image_bytes(number)[: 40 if number % 7 == 3 else None])
        lines.append(f"{folder}/{number}.png\tpicture {number}")
    (folder / "table.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "table.tsv"


def config_of(order: str, kit, folder: Path, **flags: object) -> DataConfig:
    if order == "csv":
        return kit.config(write_csv(kit, folder, 67), **flags)
    if order == "synthetic":
        return kit.config(None, dataset_type="synthetic", train_num_samples=67, **flags)
    write_damaged(kit, folder, [13, 20, 9, 25], lambda number: number % 7 == 3)
    if order == "drawn":
        return kit.config(folder, dataset_resampled=True, train_num_samples=90, **flags)
    if order == "dealt":
        return kit.config(folder, train_num_samples=90, **flags)
    return kit.config(folder, **flags)


def digits_or_words(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption), ord(caption[-1])] for caption in captions])


def open_ranks(config: DataConfig, world_size: int, preprocess: Callable) -> list[TrainLoader]:
    return [
        build_train_loader(config, preprocess, digits_or_words, rank, world_size, False) for rank in range(world_size)
    ]


@pytest.mark.parametrize("order", ["exact", "dealt", "drawn", "csv", "synthetic"])
@pytest.mark.parametrize(("world", "workers", "buffer"), [(1, 0, 9), (2, 0, 0), (1, 1, 30), (1, 3, 5)])
def test_the_rest_is_the_uninterrupted_one(
    kit, tmp_path: Path, order: str, world: int, workers: int, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if order == "dealt":
        monkeypatch.setattr("training.data.sizes.COUNTED_BYTES", 0)
    config = config_of(order, kit, tmp_path, workers=workers, shuffle_buffer=buffer, batch_size=3)
    whole_ranks = open_ranks(config, world, kit.noisy_preprocess)
    whole, states = [], {}
    steps = whole_ranks[0].steps_per_epoch
    for loader in whole_ranks:
        whole.append([])
        places = {0: loader.place(0)}
        for step, batch in enumerate(loader.epoch(EPOCH), start=1):
            whole[-1].append(Batch(*(part.clone() for part in batch)))
            places[step] = loader.place(step)
        states[len(whole)] = places
    # Worker processes take time to start; without them every step is tried.
    for step in range(steps + 1) if workers == 0 else (0, steps // 2, steps - 1, steps):
        places = torch.stack([states[rank][step] for rank in range(1, world + 1)])
        state = through_a_file(whole_ranks[0].state(places, step))
        for rank, loader in enumerate(open_ranks(config, world, kit.noisy_preprocess)):
            assert loader.resume_at(state, EPOCH) == step
            assert torch.equal(loader.place(step), places[rank])
            assert same(batches(loader, EPOCH), whole[rank][step:])
            assert torch.equal(loader.place(steps), states[rank + 1][steps])


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_twice_and_into_the_next_epoch(kit, tmp_path: Path, workers: int) -> None:
    config = config_of("exact", kit, tmp_path, workers=workers, shuffle_buffer=12)
    (loader,) = open_ranks(config, 1, kit.noisy_preprocess)
    whole, following = batches(loader, EPOCH), batches(loader, EPOCH + 1)
    (first,) = open_ranks(config, 1, kit.noisy_preprocess)
    batches(first, EPOCH, 4)
    (second,) = open_ranks(config, 1, kit.noisy_preprocess)
    assert second.resume_at(state_after([first], 4), EPOCH) == 4
    assert same(batches(second, EPOCH, 5), whole[4:9])
    (third,) = open_ranks(config, 1, kit.noisy_preprocess)
    batches(third, EPOCH + 1, 1)  # Its workers are running when it learns where to go on.
    assert third.resume_at(state_after([second], 9), EPOCH) == 9
    assert same(batches(third, EPOCH), whole[9:])
    assert same(batches(third, EPOCH + 1), following)
    assert third.resume_at(None, EPOCH) == 0
    assert same(batches(third, EPOCH), whole)


def test_a_state_of_another_epoch_begins_the_epoch(kit, tmp_path: Path) -> None:
    config = config_of("exact", kit, tmp_path)
    (loader,) = open_ranks(config, 1, kit.noisy_preprocess)
    batches(loader, EPOCH)
    state = state_after([loader], loader.steps_per_epoch)
    (resumed,) = open_ranks(config, 1, kit.noisy_preprocess)
    assert resumed.resume_at(state, EPOCH) == resumed.steps_per_epoch
    assert batches(resumed, EPOCH) == []
    assert resumed.resume_at(state, EPOCH + 1) == 0
    assert same(batches(resumed, EPOCH + 1), batches(loader, EPOCH + 1))


@pytest.mark.parametrize(("column", "least"), [(0, 2), (1, 1)], ids=["later passes", "spares"])
@pytest.mark.parametrize("order", ["exact", "dealt", "csv"])
def test_in_later_passes_and_in_spares(
    kit, tmp_path: Path, column: int, least: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most samples are broken, so that consumers go through their part again and again, or find nothing in it."""
    if order == "csv":
        config = kit.config(write_csv(kit, tmp_path, 48))
        for number in range(48):
            if number % 16 > 1 - column:
                (tmp_path / f"{number}.png").unlink(missing_ok=True)
    else:
        # One shard for a consumer in the dealt order: three of four have nothing.
        write_damaged(kit, tmp_path, [12] * 4, lambda n: n % 12 > 3 if column == 0 else n > 11 or n % 12 > 4)
        config = kit.config(tmp_path, shuffle_buffer=5)
    if order == "dealt":
        monkeypatch.setattr("training.data.sizes.COUNTED_BYTES", 0)
    config.train_num_samples, config.batch_size, world = 48, 2, 4
    for rank in range(world):
        loader = open_ranks(config, world, kit.noisy_preprocess)[rank]
        whole, places = [], [loader.place(0)]
        for batch in loader.epoch(EPOCH):
            whole.append(Batch(*(part.clone() for part in batch)))
            places.append(loader.place(len(whole)))
        if rank == 0:
            most = 0
        most = max(most, *(int(place[0, column]) for place in places))
        for step, place in enumerate(places):
            state = through_a_file(loader.state(torch.stack([place] * world), step))
            resumed = open_ranks(config, world, kit.noisy_preprocess)[rank]
            assert resumed.resume_at(state, EPOCH) == step
            assert same(batches(resumed, EPOCH), whole[step:])
            assert torch.equal(resumed.place(len(whole)), places[-1])
    assert most >= least


def test_damaged_shards_among_those_passed_over(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [30, 30, 30])
    (tmp_path / "sizes.json").write_text('{"00000.tar": 30, "00001.tar": 30, "00002.tar": 30}')
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[: 11 * 6 * 512 + 700])
    (tmp_path / "00002.tar").write_bytes(b"<html>404</html>" * 100)
    config = kit.config(tmp_path, shuffle_buffer=20, batch_size=5)
    loader = open_ranks(config, 1, kit.noisy_preprocess)[0]
    whole, states = [], [state_after([loader], 0)]
    for batch in loader.epoch(EPOCH):
        whole.append(Batch(*(part.clone() for part in batch)))
        states.append(state_after([loader], len(whole)))
    counts = loader.counts(len(whole))
    assert counts.good == 90
    assert sum(counts.problems.values()) > 30
    for step, state in enumerate(states):
        resumed = open_ranks(config, 1, kit.noisy_preprocess)[0]
        resumed.resume_at(state, EPOCH)
        assert same(batches(resumed, EPOCH), whole[step:])


def test_only_what_the_buffer_holds_is_read(kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.write_shards(tmp_path, [50] * 8)
    config = kit.config(tmp_path, shuffle_buffer=10, batch_size=10)
    (loader,) = open_ranks(config, 1, kit.noisy_preprocess)
    whole = batches(loader, EPOCH)
    (loader,) = open_ranks(config, 1, kit.noisy_preprocess)
    batches(loader, EPOCH, 30)
    state = state_after([loader], 30)
    read = []

    def watched(part: ShardSlice) -> Iterator[RawSample]:
        read.append((part.shard.url, len(part.places())))
        return read_slots(part)

    monkeypatch.setattr("training.data.sources.read_slots", watched)
    (resumed,) = open_ranks(config, 1, kit.noisy_preprocess)
    resumed.resume_at(state, EPOCH)
    assert same(batches(resumed, EPOCH), whole[30:])
    assert sum(count for _, count in read) == 100
    assert len({url for url, _ in read}) < 6


def test_counts_are_those_of_the_steps_asked_for(kit, tmp_path: Path) -> None:
    config = config_of("exact", kit, tmp_path, workers=2, batch_size=4)
    (loader,) = open_ranks(config, 1, kit.noisy_preprocess)
    assert loader.counts(0) == (0, {}, "")
    seen = [loader.counts(0)]
    for step, _batch in enumerate(loader.epoch(0), start=1):
        seen.append(loader.counts(step))
        assert loader.counts(step).good == 4 * step
        assert loader.counts(step - 1) == seen[step - 1]
    broken_shards = {f"{tmp_path}/{index:05d}.tar" for index in range(4)}
    assert {shard for _, shard in seen[-1].problems} <= broken_shards
    assert sum(seen[-1].problems.values()) >= 5
    assert "image" in seen[-1].last
    with pytest.raises(ValueError, match="is not known"):
        loader.counts(len(seen))
    for _batch in loader.epoch(1):
        break
    assert loader.counts(1).good == 4


def test_problems_are_logged_by_the_training_process(kit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("exact", kit, tmp_path, workers=2, batch_size=4)
    (loader,) = open_ranks(config, 1, kit.noisy_preprocess)
    batches(loader, 0)
    messages = [record.getMessage() for record in caplog.records if "left out so far" in record.getMessage()]
    assert 3 <= len(messages) <= 6
    assert messages[-1].count(" × ") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clock_changes_nothing(kit, tmp_path: Path, workers: int) -> None:
    config = config_of("exact", kit, tmp_path, workers=workers, shuffle_buffer=8)
    (loader,) = open_ranks(config, 1, kit.noisy_preprocess)
    batches(loader, EPOCH, 5)
    state = state_after([loader], 5)
    config.batch_size = 5
    rests = []
    for clock in (None, StageClock(workers)):
        loader = build_train_loader(config, kit.noisy_preprocess, digits_or_words, 0, 1, False, clock)
        loader.resume_at(state, EPOCH)
        rests.append(batches(loader, EPOCH))
    assert len(rests[0]) > 3
    assert same(*rests)
    assert clock.read()["read"].images > 20


def test_state_refuses_places_of_another_form(kit, tmp_path: Path) -> None:
    (loader,) = open_ranks(config_of("exact", kit, tmp_path), 1, kit.noisy_preprocess)
    with pytest.raises(ValueError, match=r"places are \[1, 2, 4\], the data is read by \[1, 1, 4\]"):
        loader.state(torch.zeros(1, 2, 4, dtype=torch.int64), 0)
