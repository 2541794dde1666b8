"""Recordings on several ranks: all of them or none, and never a message that only some ranks have recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from neuclip import RunShape, make_objective
from neuclip.normalizers.inner_loop import InnerLoop, Program
from ranks import run_on_ranks

B, DIM, STEPS = 6, 5, 5


def train(failing_rank: int | None) -> dict[str, Any]:
    """Some steps on this rank. Recording is calling the program again when asked, which suits the CPU; it may fail."""

    def record(program: Program) -> Program:
        if dist.get_rank() == failing_rank:
            raise RuntimeError("out of memory")
        replayed.append(0)

        def replay() -> None:
            replayed[0] += 1
            program()

        return replay

    replayed: list[int] = []
    InnerLoop._records = lambda loop, _: loop.enabled  # type: ignore[method-assign]
    flags = "--objective neuclip --npn_num_protos 7 --npn_repetition 2"
    objective = make_objective(flags, RunShape(DIM, B, dist.get_world_size(), 10, 2))
    objective.normalizer.loop.recorder = record
    losses: list[Tensor] = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        images, texts = F.normalize(torch.randn(2, B, DIM, generator=generator), dim=2)
        losses.append(objective(images, texts, torch.tensor(11.0)).loss)
    return {"losses": torch.stack(losses), "replayed": sum(replayed), "enabled": objective.normalizer.loop.enabled}


@pytest.fixture(scope="module")
def undisturbed() -> list[dict[str, Any]]:
    return run_on_ranks(train, 2, None)


def test_all_ranks_record(undisturbed: list[dict[str, Any]]) -> None:
    """The first step goes without, the others replay two updates each; one replay is the trial."""
    assert [found["replayed"] for found in undisturbed] == [2 * (STEPS - 1) + 1] * 2


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_where_one_rank_cannot_none_does(failing_rank: int, undisturbed: list[dict[str, Any]]) -> None:
    found = run_on_ranks(train, 2, failing_rank)
    assert [rank["replayed"] for rank in found] == [0, 0]
    assert [rank["enabled"] for rank in found] == [False, False]
    for rank, expected in zip(found, undisturbed):
        assert torch.equal(rank["losses"], expected["losses"])
