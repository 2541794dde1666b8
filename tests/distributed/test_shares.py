"""Shares of different size are refused on every rank, before they hang a collective or mix up samples."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from neuclip import OBJECTIVES, RunShape, make_objective
from ranks import run_on_ranks


def messages_of_uneven_steps(flags: str, sizes: list[list[int]]) -> list[str]:
    """What this rank says to each step; sizes[step][rank] samples."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    objective = make_objective(flags, RunShape(4, sizes[0][rank], world_size, 5, 2))
    for step in sizes:
        features = F.normalize(torch.randn(2, step[rank], 4, generator=torch.Generator().manual_seed(rank)), dim=2)
        keys = torch.arange(step[rank])
        bias = None if objective.initial_logit_bias is None else torch.tensor(-4.0)
        try:
            objective(features[0], features[1], torch.tensor(10.0), bias, keys)
            found.append("fine")
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_uneven_shares_are_named_on_every_rank(name: str) -> None:
    flags = f"--objective {name} --npn_num_protos 4 --data_size 9"
    for said in run_on_ranks(messages_of_uneven_steps, 3, flags, [[3, 2, 3], [3, 3, 3]]):
        assert said[0] == "the ranks hold [3, 2, 3] samples: every rank needs an equal share of the global batch"


def test_a_share_that_changes_later_is_named() -> None:
    flags = "--objective openclip --gather-with-grad"
    for rank, said in enumerate(run_on_ranks(messages_of_uneven_steps, 2, flags, [[3, 3], [2, 2]])):
        assert said == ["fine", f"rank {rank} has 2 samples after 3: keep shares equal"]


def test_pairs_are_needed() -> None:
    objective = make_objective("--objective openclip", RunShape(4, 3, 1, 5, 2))
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(2, 4\): give pairs"):
        objective(torch.ones(3, 4), torch.ones(2, 4), torch.tensor(10.0))
