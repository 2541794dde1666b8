"""--npn_compile: an update as one compiled program, messages included, with the results of the plain one."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from neuclip import RunShape, make_objective
from ranks import run_on_ranks

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs C++")

N, DIM = 12, 5


def train(flags: str) -> dict[str, Any]:
    """Losses and weights of some steps on this rank, and what was compiled."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    share = N // ranks
    line = f"--objective neuclip --npn_num_protos 18 --npn_repetition 3 {flags}"
    objective = make_objective(line, RunShape(DIM, share, ranks, 10, 2))
    losses = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        images, texts = F.normalize(torch.randn(2, N, DIM, generator=generator), dim=2)
        own = slice(rank * share, (rank + 1) * share)
        losses.append(objective(images[own], texts[own], torch.tensor(9.0 + step)).loss)
    counters = torch._dynamo.utils.counters
    return {
        "loss": torch.stack(losses),
        "prototypes": objective.state_dict()["normalizer.prototypes"],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_update_is_the_update(ranks: int) -> None:
    plain, compiled = (
        [train(flags)] if ranks == 1 else run_on_ranks(train, ranks, flags) for flags in ("", "--npn_compile")
    )
    for expected, found in zip(plain, compiled):
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["prototypes"], expected["prototypes"], rtol=1e-4, atol=1e-5)
        # One program for all steps with all prototypes there; the first step, with 12 of 18, is not worth one.
        assert (found["graphs"], found["breaks"]) == (1, 0)
        assert expected["graphs"] == 0
