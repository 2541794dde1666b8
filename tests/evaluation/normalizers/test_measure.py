"""The three estimates of a batch, each from the state of the checkpoint, and the errors worked out from them."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.errors import UserError
from evaluation.normalizers.examined import Examined
from evaluation.normalizers.measure import Estimates, Probes, _check_keys, compare, estimate
from neuclip import Objective, RunShape, make_objective
from neuclip.normalizers import add_log_eps
from neuclip.pairwise import batch_log_means, gather_batch
from ranks import run_on_ranks

N, DIM, STEPS = 8, 6, 5
SCALE = 14.0

METHODS = {
    "openclip": "--objective openclip",
    "fastclip": "--fastclip --multiply_tau",
    "individual": "--fastclip --temperature_scheme individual_learnable --lr_tau 0.02",
    "amorlip": "--objective amorlip",
    "amorlip, average": "--objective amorlip --no-fit_w_prev --reinit_lambda_every_n_epochs 0",
    "neuclip": "--objective neuclip --npn_num_protos 20",
    "neuclip, mlp": "--objective neuclip --npn_arch mlp",
    "neuclip, adagrad": "--objective neuclip --npn_num_protos 20 --npn_optimizer adagrad --npn_lr 0.1",
    "neuclip, together": "--objective neuclip --npn_optimization simultaneous --npn_num_protos 6",
}


def pairs(seed: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(number, DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, number, DIM, generator=generator, dtype=torch.float64)
    images, texts = F.normalize(shared + 0.7 * noise, dim=2)
    return images, texts


def examined(flags: str, ranks: int = 1) -> Examined:
    """An objective after one epoch of five steps on the samples 0 … 39, on any number of ranks."""
    from neuclip import distributed

    share, rank = N // ranks, distributed.rank()
    objective = make_objective(f"{flags} --data_size 60", RunShape(DIM, share, ranks, STEPS, 3)).double()
    objective.start_epoch(0)
    for step in range(STEPS):
        mine = slice(rank * share, (rank + 1) * share)
        batch = (x[mine] for x in pairs(step, N))
        objective(*batch, torch.tensor(SCALE, dtype=torch.float64), None, (torch.arange(N) + N * step)[mine])
    run: Any = SimpleNamespace(name="run")
    loaded: Any = None
    checkpoint: Any = None
    return Examined(run, checkpoint, loaded, objective, torch.tensor(SCALE).double(), None, step=STEPS, epoch=1)


def probes(batches: int, keys: Tensor | None = None) -> Probes:
    images, texts = pairs(99, N * batches)
    keys = torch.arange(N * batches) * 2 if keys is None else keys
    return Probes(images, texts, torch.arange(N * batches), keys)


def part(whole: Probes, rows: slice) -> Probes:
    return Probes(*(tensor[rows] for tensor in whole))


def flat(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [item for key in sorted(state) if key != "epoch" for item in [key, *flat(state[key])]]
    return [state.clone() if isinstance(state, Tensor) else state]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right)
    )


def next_step(objective: Objective, batch: Probes) -> Tensor | None:
    """What the first step of the next epoch divides by."""
    going_on = copy.deepcopy(objective)
    going_on.start_epoch(1)
    keys = batch.keys if objective.needs_keys else None
    scale = torch.tensor(SCALE, dtype=torch.float64)
    return going_on(batch.image_features, batch.text_features, scale, None, keys).log_normalizers


@pytest.mark.parametrize("method", METHODS)
def test_each_batch_meets_the_state_of_the_checkpoint(method: str) -> None:
    one, whole = examined(METHODS[method]), probes(3)
    before = flat(one.objective.state_dict())
    wanted = [next_step(one.objective, part(whole, slice(s, s + N))) for s in (0, N, 2 * N)]
    found = estimate(one, whole, N)
    for number, alpha in enumerate(wanted):
        rows = slice(number * N, (number + 1) * N)
        expected = found.batch[:, rows] if alpha is None else alpha
        torch.testing.assert_close(found.used[:, rows], expected, rtol=0, atol=1e-12)
    # At the start of an epoch AmorLIP keeps the average as it is then, and may begin its networks anew.
    if not method.startswith("amorlip"):
        assert same(before, flat(one.objective.state_dict()))


@pytest.mark.parametrize("method", METHODS)
def test_own_is_what_was_known_before_the_next_epoch(method: str) -> None:
    one, whole = examined(METHODS[method]), probes(2)
    known = one.objective.recall(
        *(tensor[:N] for tensor in whole[:2]),
        one.logit_scale,
        None,
        whole.keys[:N] if one.objective.needs_keys else None,
    )
    found = estimate(one, whole, N)
    if known is None:
        assert found.own is None
        torch.testing.assert_close(found.used, found.batch)
        return
    assert found.own is not None
    torch.testing.assert_close(found.own[:, :N], known.log_normalizers, equal_nan=True)
    torch.testing.assert_close(found.logit_scale[:, :N], known.logit_scale.expand(2, N))
    batch = gather_batch(whole.image_features[:N], whole.text_features[:N])
    expected = add_log_eps(batch_log_means(batch, found.logit_scale[:, :N]), one.objective.log_eps)
    torch.testing.assert_close(found.batch[:, :N], expected)


def test_a_key_in_two_batches_is_remembered_as_it_was() -> None:
    whole = probes(2, keys=torch.arange(N).repeat(2))
    twice = estimate(examined(METHODS["fastclip"]), whole, N)
    second = estimate(examined(METHODS["fastclip"]), part(whole, slice(N, 2 * N)), N)
    torch.testing.assert_close(twice.used[:, N:], second.used, rtol=0, atol=1e-12)


def test_keys_of_another_data_set_are_refused() -> None:
    with pytest.raises(UserError, match=r"--data is not what run was trained on: .*key 77, outside 0 … 59"):
        _check_keys(examined(METHODS["fastclip"]), torch.tensor([3, 77]))


def on_ranks(method: str) -> dict[str, Any]:
    from neuclip import distributed

    one = examined(METHODS[method], distributed.world_size())
    found: Estimates = estimate(one, probes(2), N)
    return dict(found._asdict())


@pytest.mark.parametrize("method", ["individual", "neuclip"])
def test_ranks(method: str) -> None:
    alone = on_ranks(method)
    for found in run_on_ranks(on_ranks, 2, method):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, equal_nan=True)


def test_errors_by_hand() -> None:
    truth = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    guess = torch.tensor([[2.0, 2.0, math.nan], [1.0, -1.0, 3.0]], dtype=torch.float64)
    found = compare(guess, truth)
    assert found["image"] == {"mse": 0.5, "bias": 0.5, "mean": 2.0}
    assert found["text"] == {"mse": pytest.approx(11 / 3), "bias": 1.0, "mean": 1.0}
    assert found["mse"] == pytest.approx((0.5 + 11 / 3) / 2)
    assert found["unknown"] == pytest.approx(1 / 6)


def test_nothing_known() -> None:
    truth = torch.zeros(2, 3, dtype=torch.float64)
    found = compare(torch.full_like(truth, math.nan), truth)
    assert found["image"] == {"mse": None, "bias": None, "mean": None}
    assert (found["mse"], found["unknown"]) == (None, 1.0)
