"""Who reads what, without reading anything."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from training.data.config import DataConfig
from training.data.plan import DealtOrder, DrawnOrder, ExactOrder, Layout, Place, ShardSlice, plan_steps, spare_slices
from training.data.runs import Runs
from training.data.seeds import Purpose
from training.data.shards import Shard
from training.errors import UserError


def positions(parts: list[ShardSlice], size: int | None = None) -> list[tuple[str, int]]:
    return [
        (part.shard.url, position)
        for part in parts
        for position in range(part.start, size if part.stop is None else part.stop, part.step)
    ]


def places(layout: Layout, epoch: int) -> list[Place]:
    return [Place(epoch, rank, worker) for rank in range(layout.world_size) for worker in range(layout.workers)]


@pytest.mark.parametrize("trial", range(60))
def test_exact_order_divides_the_data(trial: int) -> None:
    rng = random.Random(trial)
    shards = [Shard(str(i), 0, rng.choice([0, 1, 3, 10, 40])) for i in range(rng.randint(1, 9))]
    shards.append(Shard("last", 0, 37))
    total = sum(shard.size or 0 for shard in shards)
    batch, world, workers = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 4)
    layout = Layout(total // (batch * world), batch, world, workers, seed=trial)
    order = ExactOrder(shards, layout)
    steps_of_rank = Counter()
    seen: list[tuple[str, int]] = []
    for place in places(layout, epoch=trial):
        part = positions(list(order.slices(place, 0)))
        assert len(part) == batch * layout.worker_steps(place.worker)
        assert sorted(positions(list(order.slices(place, 1)))) == sorted(part)
        steps_of_rank[place.rank] += layout.worker_steps(place.worker)
        seen += part
    assert set(steps_of_rank.values()) == {layout.steps}
    assert len(seen) == len(set(seen)) == layout.num_samples
    assert 0 <= total - len(seen) < batch * world
    assert all(position < (shards[-1].size if url == "last" else shards[int(url)].size) for url, position in seen)
    quotas = [layout.worker_steps(worker) for worker in range(workers)]
    assert max(quotas) - min(quotas) <= 1


@pytest.mark.parametrize("purpose", Purpose)
def test_each_segment_of_an_epoch_draws_its_own_numbers(purpose: Purpose) -> None:
    layouts = [Layout(5, 2, 1, 2, seed=3, segment=number) for number in range(3)]
    drawn = {layout.derive(purpose, 1, 0, worker) for layout in layouts for worker in (0, 1)}
    assert len(drawn) == 6
    assert layouts[1].rng(purpose, 1).random() == random.Random(layouts[1].derive(purpose, 1)).random()


@pytest.mark.parametrize("trial", range(30))
def test_parts_of_the_row(trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever positions are left, they are the samples that the whole row has there, each shard opened for few slices."""
    rng = random.Random(trial)
    monkeypatch.setattr("training.data.plan._SHORT_RUN", rng.choice([1, 3, 1000]))
    shards = [Shard(str(i), 0, rng.choice([0, 1, 7, 25])) for i in range(rng.randint(1, 6))] + [Shard("last", 0, 19)]
    total = sum(shard.size or 0 for shard in shards)
    alone = ExactOrder(shards, Layout(total, 1, 1, 1, seed=trial))
    whole = slots_of(alone.slices(Place(4, 0, 0), 0))
    left = sorted(rng.sample(range(total), rng.randint(1, total)))
    row = Runs(np.array([[at, at + 1] for at in left]))
    world, workers = rng.randint(1, 3), rng.randint(1, 3)
    layout = Layout(len(left) // world, 1, world, workers, seed=trial, segment=1)
    order = alone.rest(layout, row)
    seen = []
    for place in places(layout, epoch=4):
        parts = list(order.slices(place, 0))
        seen += slots_of(iter(parts))
        assert sorted(slots_of(order.slices(place, 1))) == sorted(slots_of(iter(parts)))
        assert sum(part.count() or 0 for part in parts) == layout.worker_steps(place.worker)
    assert seen == [whole[at] for at in left][: layout.num_samples]


def slots_of(parts: Iterator[ShardSlice]) -> list[tuple[str, int]]:
    return [(part.shard.url, position) for part in parts for position in part.places()]


@pytest.mark.parametrize(
    "part", [ShardSlice(Shard("a", 0), 3, 20, 4), ShardSlice(Shard("a", 0), 2, 9, 1, frozenset({2, 5, 8}))]
)
def test_parts_of_a_slice(part: ShardSlice) -> None:
    meant = [index for index in range(30) if part.has(index)]
    assert part.places() == meant
    assert part.count() == len(meant)
    for passed in range(len(meant)):
        assert part.after(passed).places() == meant[passed:]
        assert part.only(meant[passed:]).places() == [i for i in range(30) if part.only(meant[passed:]).has(i)]
    assert ShardSlice(Shard("a", 0), 3).count() is None


def test_spares_have_a_known_number_where_sizes_are_known() -> None:
    layout = Layout(1, 1, 1, 1, seed=3)
    order = ExactOrder([Shard("a", 0, 5), Shard("b", 0, 7)], layout)
    assert sum(part.count() or 0 for part in spare_slices(order, Place(0, 0, 0), 0)) == 12


def test_one_shard_leaves_out_other_samples_each_epoch() -> None:
    layout = Layout(steps=3, batch_size=3, world_size=1, workers=1, seed=0)
    order = ExactOrder([Shard("a", 0, 10)], layout)
    used = [frozenset(positions(list(order.slices(Place(epoch, 0, 0), 0)))) for epoch in range(12)]
    assert len(set(used)) > 3


@pytest.mark.parametrize(("shards", "world", "workers"), [(9, 2, 2), (4, 2, 2), (3, 2, 2), (1, 3, 2), (5, 4, 3)])
def test_dealt_order_covers_all_shards_once(shards: int, world: int, workers: int) -> None:
    layout = Layout(1, 1, world, workers, seed=3)
    order = DealtOrder([Shard(str(i), 0) for i in range(shards)], layout)
    parts = [positions(list(order.slices(place, 0)), size=24) for place in places(layout, 5)]
    assert all(parts)
    seen = [position for part in parts for position in part]
    assert sorted(seen) == sorted((str(i), position) for i in range(shards) for position in range(24))


def test_dealt_order_changes_between_epochs_and_starts_over_on_its_own() -> None:
    layout = Layout(1, 1, 1, 2, seed=3)
    order = DealtOrder([Shard(str(i), 0) for i in range(20)], layout)
    first, second = ([part.shard.url for part in order.slices(Place(epoch, 0, 0), 0)] for epoch in (0, 1))
    again = [part.shard.url for part in order.slices(Place(0, 0, 0), 1)]
    assert set(first) != set(second)
    assert set(again) == set(first)
    assert again != first


def test_drawn_order_follows_the_factors_per_shard() -> None:
    # As in open_clip, a factor multiplies the draws of each shard of its source: 1 x 6 shards against 4 x 2 shards.
    shards = [Shard(f"a{i}", 0) for i in range(6)] + [Shard(f"b{i}", 1) for i in range(2)]
    layout = Layout(1, 1, 2, 2, seed=1)
    order = DrawnOrder(shards, layout, [1.0, 4.0])
    drawn = Counter(
        part.shard.url for epoch in range(40) for place in places(layout, epoch) for part in order.slices(place, 0)
    )
    assert drawn.total() > 4000
    for shard in shards:
        expected = (1, 4)[shard.source] / 14
        assert drawn[shard.url] / drawn.total() == pytest.approx(expected, rel=0.2)


def test_drawn_order_is_independent_of_other_consumers() -> None:
    shards = [Shard(str(i), 0) for i in range(50)]
    layout = Layout(1, 1, 2, 2, seed=1)
    order = DrawnOrder(shards, layout, [1.0])
    draws = [tuple(part.shard.url for part in order.slices(place, 0)) for e in (0, 1) for place in places(layout, e)]
    assert len(set(draws)) == len(draws) == 8
    assert draws[0] == tuple(part.shard.url for part in order.slices(Place(0, 0, 0), 0))


@pytest.mark.parametrize(
    ("asked", "total", "message"),
    [
        (None, None, "--train-num-samples is missing"),
        (101, 100, "more than the 100 samples"),
        (None, 15, "--batch-size 4 on 4 ranks takes 16"),
        (15, None, "--batch-size 4 on 4 ranks takes 16"),
    ],
)
def test_plan_steps_refuses(asked: int | None, total: int | None, message: str) -> None:
    config = DataConfig("x.tar", train_num_samples=asked, batch_size=4)
    with pytest.raises(UserError, match=message):
        plan_steps(config, 4, total)


def test_plan_steps_refuses_by_the_flags_that_were_given() -> None:
    with pytest.raises(UserError, match="--batch-size 4 --accum-freq 3 on 2 ranks takes 24 samples a step"):
        plan_steps(DataConfig("x.tar", batch_size=4, accum_freq=3), 2, 23)


def test_plan_steps_counts_whole_global_batches() -> None:
    assert plan_steps(DataConfig("x.tar", batch_size=4, accum_freq=3), 2, 100) == 4
    assert plan_steps(DataConfig("x.tar", batch_size=4), 2, 100) == 12
    assert plan_steps(DataConfig("x.tar", batch_size=4, train_num_samples=41), 2, 100) == 5
    assert plan_steps(DataConfig("x.tar", batch_size=4, train_num_samples=410), 2, None) == 51
