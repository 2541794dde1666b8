"""Functions run on ranks: results, failures and hangs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from neuclip.distributed import all_reduce_log_sum_exp
from ranks import run_on_ranks


def sum_of_ranks(offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), total


def sum_of_exponentials(exponents: torch.Tensor) -> tuple[torch.Tensor, bool]:
    own = exponents[dist.get_rank()].clone()
    return all_reduce_log_sum_exp(own), torch.equal(own, exponents[dist.get_rank()])


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()
    time.sleep(600)


def hang() -> None:
    time.sleep(600)


def test_results_come_back_in_the_order_of_the_ranks() -> None:
    results = run_on_ranks(sum_of_ranks, 2, torch.tensor([10.0, 20.0]))
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.tolist() == [21.0, 41.0] for _, total in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithms_are_summed_over_a_range_that_float32_has_not(dtype: torch.dtype) -> None:
    inf = float("inf")
    exponents = torch.tensor([[200.0, -200.0, 600.0, -inf, -inf, 3.0], [199.0, -201.0, -600.0, 5.0, -inf, 3.0]])
    found = run_on_ranks(sum_of_exponentials, 2, exponents.to(dtype))
    expected = torch.logaddexp(*exponents.double()).to(dtype)
    for total, untouched in found:
        torch.testing.assert_close(total, expected, rtol=1e-15 if dtype == torch.float64 else 1e-7, atol=0)
        assert untouched


def test_a_failing_rank_ends_the_others_and_shows_its_traceback() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1:.*in fail_on_rank_1.*KeyError: 'the cause'"):
        run_on_ranks(fail_on_rank_1, 2)
    assert time.monotonic() - started < 100


def test_ranks_that_hang_are_killed() -> None:
    with pytest.raises(TimeoutError, match="still ran after 2 s"):
        run_on_ranks(hang, 1, timeout=2.0)
