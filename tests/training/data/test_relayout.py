"""An epoch that goes on with other ranks, workers or batches: every sample still comes once."""

from __future__ import annotations

import io
import itertools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.data import DataConfig, TrainLoader, build_train_loader
from training.data.plan import Layout, Place
from training.data.seeds import Purpose
from training.data.segments import Course, DataIdentity, Segment, begin, left_over, resume
from training.data.shuffle import shuffled

EPOCH = 2
# Ranks, workers, batch of a rank, and steps taken before the next change (None: to the end).
Stretch = tuple[int, int, int, int | None]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def lengths(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption)] for caption in captions])


def open_rank(config: DataConfig, world: int, rank: int, preprocess: Callable) -> TrainLoader:
    return build_train_loader(config, preprocess, lengths, rank, world, False)


def run(
    kit, config: DataConfig, world: int, state: dict[str, Any] | None, steps: int | None = None
) -> tuple[list[list[int]], int, dict[str, Any]]:
    """Keys of each rank, the first step, and the state after `steps` further steps."""
    keys, places, loaders = [], [], []
    for rank in range(world):
        loader = open_rank(config, world, rank, kit.noisy_preprocess)
        first = loader.resume_at(state, EPOCH)
        stop = loader.steps_per_epoch if steps is None else first + steps
        batches = itertools.islice(loader.epoch(EPOCH), stop - first)
        keys.append([key for batch in batches for key in batch.keys.tolist()])
        assert len(keys[-1]) == (stop - first) * config.batch_size
        places.append(loader.place(stop))
        loaders.append(loader)
    states = [through_a_file(loader.state(torch.stack(places), stop)) for loader in loaders]
    assert all(str(other) == str(states[0]) for other in states)
    return keys, first, states[0]


def data_of(kind: str, kit, folder: Path, samples: int) -> DataConfig:
    if kind == "synthetic":
        return kit.config(None, dataset_type="synthetic", train_num_samples=samples)
    if kind == "csv":
        for number in range(samples):
            (folder / f"{number}.png").write_bytes(kit.image_bytes(number))
        rows = [f"{folder}/{number}.png\tpicture {number}" for number in range(samples)]
        (folder / "table.tsv").write_text("\n".join(["filepath\ttitle", *rows]), encoding="utf-8")
        return kit.config(folder / "table.tsv")
    kit.write_shards(folder, [samples // 2, 7, 1, samples - samples // 2 - 8])
    return kit.config(folder)


CHAINS: dict[str, list[Stretch]] = {
    "1-2-4-1": [(1, 0, 4, 5), (2, 0, 4, 3), (4, 0, 2, 2), (1, 0, 4, None)],
    "nothing taken": [(2, 0, 3, 0), (1, 0, 5, 1), (3, 0, 2, 0), (1, 0, 2, None)],
    "as many steps with larger batches": [(1, 0, 20, 2), (1, 0, 60, None)],
    "nothing left": [(1, 0, 4, None), (2, 0, 3, None)],
}


@pytest.mark.parametrize("kind", ["exact", "csv", "synthetic"])
@pytest.mark.parametrize("chain", CHAINS)
def test_every_sample_once(kit, tmp_path: Path, kind: str, chain: str) -> None:
    _check_chain(kit, data_of(kind, kit, tmp_path, 103), CHAINS[chain])


def test_every_sample_once_with_other_workers(kit, tmp_path: Path) -> None:
    chain = [(1, 3, 4, 5), (2, 2, 3, 3), (1, 0, 4, 2), (2, 1, 5, None)]
    _check_chain(kit, data_of("exact", kit, tmp_path, 103), chain)


def _check_chain(kit, config: DataConfig, chain: list[Stretch]) -> None:
    config.shuffle_buffer = 11
    samples, seen, state = 103, list[int](), None
    for world, workers, batch, steps in chain:
        config.batch_size, config.workers = batch, workers
        before = len(seen)
        keys, first, state = run(kit, config, world, state, steps)
        assert first == samples // (batch * world) - (samples - before) // (batch * world)
        seen += [key for of_rank in keys for key in of_rank]
    assert len(state["segments"]) == len(chain)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(samples))
    assert samples - len(seen) < batch * world


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_neither_left_nor_do_others_come_twice(kit, tmp_path: Path, workers: int) -> None:
    config = data_of("exact", kit, tmp_path, 120)
    bad = set(range(3, 60, 7))
    members = [kit.members_of(number) for number in range(60)]
    for number in bad:
        members[number][0] = (f"{number:06d}.png", b"\x89PNG")
    kit.write_tar(tmp_path / "00000.tar", members)
    config.shuffle_buffer, config.workers = 9, workers
    keys, _, state = run(kit, config, 2, None, 6)
    before = [key for of_rank in keys for key in of_rank]
    taken = state["segments"][-1]["places"]
    assert taken[:, :, 0].sum() == 0  # All in their first pass.
    assert taken[:, :, 2].sum() > len(before)  # Broken ones were among those taken.
    config.batch_size = 3
    keys, first, _ = run(kit, config, 1, state)
    after = [key for of_rank in keys for key in of_rank]
    assert first == 40 - (120 - int(taken[:, :, 2].sum())) // 3
    assert set(before).isdisjoint(after)
    assert 120 - len(bad) - len(before) - len(set(after)) < 3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_under_another_layout_is_resumed_to_the_bit(kit, tmp_path: Path, workers: int) -> None:
    config = data_of("exact", kit, tmp_path, 103)
    config.shuffle_buffer = 11
    _, _, state = run(kit, config, 1, None, 5)
    config.batch_size, config.workers = 3, workers
    loader = open_rank(config, 1, 0, kit.noisy_preprocess)
    first = loader.resume_at(state, EPOCH)
    images, states = [], [through_a_file(loader.state(loader.place(first)[None], first))]
    for step, batch in enumerate(loader.epoch(EPOCH), start=first + 1):
        images.append(batch.image.clone())
        states.append(through_a_file(loader.state(loader.place(step)[None], step)))
    assert len(images) == (103 - 20) // 3
    for done in (0, 1, 12, len(images)):
        again = open_rank(config, 1, 0, kit.noisy_preprocess)
        assert again.resume_at(states[done], EPOCH) == first + done
        rest = [batch.image.clone() for batch in again.epoch(EPOCH)]
        assert len(rest) == len(images) - done
        assert all(map(torch.equal, rest, images[done:]))
        # The epoch after it is an ordinary one.
        other = open_rank(config, 1, 0, kit.noisy_preprocess)
        assert all(torch.equal(a.image, b.image) for a, b in zip(again.epoch(EPOCH + 1), other.epoch(EPOCH + 1)))


def whole_of(layout: Layout, samples: int, buffer: int) -> Segment:
    return Segment.whole(layout, samples, buffer)


def read_some(course: Course, identity: DataIdentity, steps: int, chance: random.Random) -> tuple[list[int], list]:
    """Positions that come out of all shuffle buffers in some steps, and where consumers stand after them."""
    segment, layout, row = course.segment, course.segment.layout(identity.seed), course.row
    places, seen = segment.places(), []
    for rank, worker in itertools.product(range(segment.world_size), range(segment.workers)):
        place = Place(course.epoch, rank, worker)
        own = row.part(*layout.sample_range(place)).positions().tolist()
        rng = layout.rng(Purpose.SHUFFLE_BUFFER, *place, 0)
        # Some more than there are batches: those were broken.
        taken = min((steps - worker + segment.workers - 1) // segment.workers * segment.batch_size, len(own))
        taken = min(taken + chance.randint(0, 2), len(own)) if taken else 0
        seen += list(itertools.islice(shuffled(own, segment.shuffle_buffer, rng), taken))
        places[rank, worker] = torch.tensor([0, 0, taken, 1])
    return seen, places


@pytest.mark.parametrize("seed", range(40))
def test_what_is_left_is_what_was_not_taken(seed: int) -> None:
    chance = random.Random(seed)
    samples = chance.randint(50, 900)
    identity = DataIdentity("exact", seed, "x")
    state, seen = None, list[int]()
    for number in range(5):
        world, workers, batch = chance.randint(1, 4), chance.randint(1, 3), chance.randint(1, 6)
        steps, buffer = samples // (world * batch), chance.choice([0, 3, 20, 500])
        whole = whole_of(Layout(steps, batch, world, workers, seed), samples, buffer)
        course = resume(state, EPOCH, whole, identity)
        left = left_over(course.past, course.segment, seed, EPOCH)
        assert sorted([*seen, *left.positions().tolist()]) == list(range(samples))
        assert course.step == steps - len(left) // (world * batch)
        assert course.segment.number == number
        done = chance.randint(0, steps - course.step)
        found, places = read_some(course, identity, done, chance)
        seen += found
        state = through_a_file(course.entry(identity, places, course.step + done))
        again = resume(state, EPOCH, whole, identity)
        assert (again.step, again.segment) == (course.step + done, course.segment)
        assert torch.equal(again.places, places)
        assert len(again.past) == number


def test_a_consumer_past_its_first_pass_has_nothing_left() -> None:
    identity = DataIdentity("exact", 0, "x")
    course = begin(EPOCH, whole_of(Layout(10, 2, 2, 1, 0), 43, 5))
    for column, numbers in enumerate(([1, 0, 3, 1], [0, 1, 4, 0])):
        places = torch.tensor([[[0, 0, 0, 0]], [numbers]])
        state = course.entry(identity, places, 4)
        found = resume(state, EPOCH, whole_of(Layout(21, 2, 1, 1, 0), 43, 5), identity)
        assert list(found.row) == [(0, 20), (40, 43)], column
        assert found.step == 21 - 11


@pytest.mark.parametrize(("asked", "left"), [(30, [(12, 30)]), (60, [(12, 60)])])
def test_another_number_of_samples(asked: int, left: list[tuple[int, int]]) -> None:
    identity = DataIdentity("exact", 0, "x")
    course = begin(EPOCH, whole_of(Layout(10, 4, 1, 1, 0), 41, 0))
    state = course.entry(identity, torch.tensor([[[0, 0, 12, 1]]]), 3)
    found = resume(state, EPOCH, whole_of(Layout(asked // 4, 4, 1, 1, 0), asked, 0), identity)
    assert list(found.row) == left
    assert found.step == asked // 4 - (asked - 12) // 4


def test_fewer_samples_and_then_more() -> None:
    identity = DataIdentity("exact", 0, "x")
    course = begin(EPOCH, whole_of(Layout(10, 2, 2, 1, 0), 40, 0))
    state = course.entry(identity, torch.tensor([[[0, 0, 4, 1]], [[0, 0, 16, 1]]]), 5)
    course = resume(state, EPOCH, whole_of(Layout(6, 5, 1, 1, 0), 30, 0), identity)
    assert list(course.row) == [(4, 20)]
    state = course.entry(identity, torch.tensor([[[0, 0, 5, 1]]]), 4)
    assert list(resume(state, EPOCH, whole_of(Layout(12, 5, 1, 1, 0), 60, 0), identity).row) == [(9, 20), (36, 60)]


def test_a_billion_samples() -> None:
    """Numbers for what is left of them fit into a few megabytes, and nothing is read."""
    identity = DataIdentity("exact", 0, "x")
    samples = 10**9
    course = begin(EPOCH, whole_of(Layout(samples // (8 * 512), 512, 8, 6, 0), samples, 5000))
    places = torch.tensor([0, 0, 512 * 1000, 1]).expand(8, 6, 4)
    state = through_a_file(course.entry(identity, places.contiguous(), 6000))
    whole = whole_of(Layout(samples // (4 * 512), 512, 4, 4, 0), samples, 5000)
    found = resume(state, EPOCH, whole, identity)
    row = found.row
    assert len(row) == samples - 48 * 512_000
    assert len(row.bounds) <= 48 * 5001
    assert found.step == whole.steps - len(row) // 2048


@pytest.mark.usefixtures("sizes_unknown")
@pytest.mark.parametrize("order", ["dealt", "drawn"])
def test_without_sizes_the_rest_is_read_anew(kit, tmp_path: Path, order: str, caplog: pytest.LogCaptureFixture) -> None:
    kit.write_shards(tmp_path, [12] * 10)
    config = kit.config(tmp_path, train_num_samples=120, dataset_resampled=order == "drawn", shuffle_buffer=5)
    before, _, state = run(kit, config, 1, None, 10)
    config.batch_size = 3
    with caplog.at_level(logging.WARNING):
        keys, first, later = run(kit, config, 2, state, 4)
        assert first == 7  # A third of 20 steps, rounded up.
        again, _, _ = run(kit, config, 2, state, 4)
        assert again == keys
        fresh, _, _ = run(kit, config, 2, None, 11)
        assert not any(of_rank == others[-12:] for of_rank, others in zip(keys, fresh))
        rest, first, _ = run(kit, config, 2, later)
        assert first == 11
    assert len(before[0]) + sum(map(len, keys)) + sum(map(len, rest)) == 40 + 24 + 54
    warnings = [record.getMessage() for record in caplog.records]
    # One for each loader that changed the layout: twice two ranks.
    assert len(warnings) == (4 if order == "dealt" else 0)
    assert all("python -m training.data.index makes this exact" in warning for warning in warnings)


@pytest.mark.parametrize("what", ["--seed (then 0, now 1)", "--train-data (names", "the order of the data (then exact"])
def test_other_data_is_warned_of(
    kit, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data_of("exact", kit, tmp_path, 100)
    state = run(kit, config, 1, None, 10)[2]
    if what.startswith("--seed"):
        config.seed = 1
    elif what.startswith("--train-data"):
        kit.write_shards(tmp_path, [60])
    else:
        config.train_num_samples = 80
        monkeypatch.setattr("training.data.sizes.COUNTED_BYTES", 0)
    keys, first, later = run(kit, config, 1, state, 3)
    total = config.train_num_samples or (100 if config.seed else 111)
    assert first == -(-(total // 4) * 10 // 25)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert what in warning
    assert f"goes on at step {first} of {total // 4} of the present data" in warning
    # From here on it is an epoch like any other.
    rest, first_of_rest, _ = run(kit, config, 1, later)
    assert first_of_rest == first + 3
    if not config.train_num_samples:
        together = keys[0] + rest[0]
        assert len(set(together)) == len(together) == (total // 4 - first) * 4
    assert len(caplog.records) == 1


def test_the_same_data_in_another_folder(kit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = data_of("exact", kit, tmp_path / "a", 60)
    _, _, state = run(kit, config, 1, None, 4)
    keys, _, _ = run(kit, config, 1, state)
    other = data_of("exact", kit, tmp_path / "b", 60)
    assert run(kit, other, 1, state)[0] == keys
    assert caplog.records == []


def test_an_entry_of_another_form_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    identity = DataIdentity("exact", 0, "x")
    whole = whole_of(Layout(10, 4, 1, 1, 0), 41, 0)
    state = {"format": 0, "epoch": EPOCH, "step": 5}
    found = resume(state, EPOCH, whole, identity)
    assert (found.step, found.segment) == (0, whole)
    assert "the epoch is begun again from its start" in caplog.text
