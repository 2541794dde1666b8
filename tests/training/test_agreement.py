"""Numbers of all ranks, added up one step late and never waited for."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from ranks import run_on_ranks
from training.agreement import Agreement
from training.distributed import Channel, World

CPU = torch.device("cpu")


def exchanges() -> list[dict[str, int]]:
    """What a rank is told in three steps and at the end."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU, Channel(dist.new_group(backend="gloo")))
    agreement = Agreement(world, ("a", "b"))
    told = [agreement.exchange({"a": world.rank + 1, "b": step}) for step in range(3)]
    # Other messages of the same group may lie in between.
    assert world.gather(world.rank) == list(range(world.size))
    return [*told, agreement.settle({"a": 10, "b": world.rank}), agreement.exchange({"a": 0, "b": 0})]


def test_sums_come_one_step_late() -> None:
    for told in run_on_ranks(exchanges, 3):
        assert told == [
            {"a": 0, "b": 0},
            {"a": 6, "b": 0},
            {"a": 6, "b": 3},
            {"a": 30, "b": 3},
            {"a": 30, "b": 3},
        ]


def slow_rank() -> float:
    """Seconds that the quick rank 0 spends in its first exchange while rank 1 is late."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU, Channel(dist.new_group(backend="gloo")))
    agreement = Agreement(world, ("a",))
    if world.rank == 1:
        time.sleep(1.0)
    began = time.monotonic()
    agreement.exchange({"a": 1})
    took = time.monotonic() - began
    assert agreement.settle({"a": 1}) == {"a": 2}
    return took


def test_nobody_is_waited_for() -> None:
    assert run_on_ranks(slow_rank, 2)[0] < 0.5


def test_alone_there_is_no_delay() -> None:
    agreement = Agreement(World(0, 1, CPU), ("a",))
    assert agreement.exchange({"a": 3, "other": 4}) == {"a": 3}
    assert agreement.settle({"a": 5}) == {"a": 5}
