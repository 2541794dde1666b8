"""On 1, 2 and 4 ranks every objective is the single-process objective on the concatenated batch, in float64.

Averaged over the ranks: the loss and the metrics. Equal on every rank: the gradient of every parameter (after
DistributedDataParallel) and everything that the objective learns or remembers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuclip import OBJECTIVES, make_objective
from neuclip.normalizers import (
    Alternating,
    MLPNormalizer,
    NormalizerNetwork,
    PrototypeNormalizer,
    UnitRowsAdaGradNorm,
)
from neuclip.objectives import RunShape
from neuclip.objectives.amorlip import AmorLIP
from neuclip.objectives.neuclip import NeuCLIP
from ranks import run_on_ranks

from .programs import DATA_SIZE, EMBED_DIM, GLOBAL_BATCH, STEPS, Record, run, run_all

FAST = "--fastclip --gamma 0.4 --rho 2"
NPN = "--objective neuclip --npn_repetition 3"
TOGETHER = "--objective neuclip --npn_optimization simultaneous"
AMORLIP = "--objective amorlip --update_ema_mlps_every_n_steps 1 --model_ema_beta 0.5"
VARIANTS = {name: f"--objective {name}" for name in OBJECTIVES}
VARIANTS |= {f"{name}, chunked": f"{flags} --loss-chunk-size 3" for name, flags in VARIANTS.items()} | {
    "openclip, gather with grad": "--objective openclip --gather-with-grad",
    "openclip, local loss": "--objective openclip --local-loss --gather-with-grad",
    # Without chunks this one is not the gradient of its loss.
    "openclip, local loss, chunked": "--objective openclip --local-loss --loss-chunk-size 3",
    "siglip, shift": "--objective siglip --loss-dist-impl shift",
    "siglip, reduce": "--objective siglip --loss-dist-impl reduce",
    "siglip, gather": "--objective siglip --loss-dist-impl gather",
    "fastclip v1": f"{FAST} --temperature_scheme global_constant",
    "fastclip v2": f"{FAST} --temperature_scheme individual_learnable --temperature 0.1 --lr_tau 0.02",
    "fastclip v3": f"{FAST} --multiply_tau",
    "sogclr": f"{FAST} --temperature_scheme global_constant --gamma_schedule constant",
    "isogclr": f"{FAST} --temperature_scheme individual_learnable --lr_tau 0.02 --gamma_schedule constant",
    "neuclip, m<N": f"{NPN} --npn_num_protos 6 --npn_restart_iter 3 --gamma_schedule cosine",
    "neuclip, m=N": f"{NPN} --npn_num_protos 16 --npn_restart_iter 0 --gamma_schedule constant --gamma 0.3",
    "neuclip, m>N": f"{NPN} --npn_num_protos 40 --npn_restart_iter 4 --gamma_decay_epochs 1.5",
    "neuclip, m odd": f"{NPN} --npn_num_protos 13 --npn_restart_iter 3",
    "neuclip, m odd, m>N": f"{NPN} --npn_num_protos 35 --npn_restart_iter 4",
    "neuclip, m<K": f"{NPN} --npn_num_protos 3 --npn_restart_iter 2",
    "neuclip, adagrad, m<K, chunked": f"{NPN} --npn_num_protos 3 --npn_optimizer adagrad --npn_lr 0.1 --loss-chunk-size 5",
    "neuclip, simultaneous, m odd": f"{TOGETHER} --npn_num_protos 37 --npn_restart_iter 4",
    "neuclip, printed": f"{NPN} --npn_num_protos 40 --npn_restart_iter 4 --gamma 0",
    "neuclip, gamma 1": f"{NPN} --npn_num_protos 6 --gamma 1",
    "neuclip, no eps": f"{NPN} --npn_num_protos 6 --fastclip_eps 0 --gamma 0.1 --gamma_schedule constant",
    "neuclip, adagrad, m<N": f"{NPN} --npn_num_protos 6 --npn_optimizer adagrad --npn_lr 0.1 --npn_wd 0.01",
    "neuclip, adagrad, m>N": f"{NPN} --npn_num_protos 40 --npn_optimizer adagrad --npn_lr 0.1 --npn_restart_iter 4",
    "neuclip, constant temperature": f"{NPN} --npn_num_protos 6 --temperature_scheme global_constant",
    "neuclip, separate": f"{NPN} --npn_num_protos 40 --npn_objective separate --npn_restart_iter 4",
    "neuclip, mlp": f"{NPN} --npn_arch mlp --npn_restart_iter 4",
    "neuclip, mlp, separate": f"{NPN} --npn_arch mlp --npn_objective separate --npn_optimizer adagrad_norm --npn_wd 0.1",
    "neuclip, simultaneous, m<N": f"{TOGETHER} --npn_num_protos 6 --npn_restart_iter 3",
    "neuclip, simultaneous, m>N": f"{TOGETHER} --npn_num_protos 40 --npn_restart_iter 4 --npn_objective separate",
    "neuclip, simultaneous, mlp": f"{TOGETHER} --npn_arch mlp --npn_restart_iter 4",
    "amorlip, log_l2": f"{AMORLIP} --lambda-update-frequency 4 --pos_coef 0.5",
    "amorlip, kl_div_asym": f"{AMORLIP} --lambda_loss_type kl_div_asym --reinit_lambda_every_n_epochs 0",
    "amorlip, kl_div_sym": f"{AMORLIP} --lambda_loss_type kl_div_sym --lambda_fit_neg_only",
    # A network that has learnt nothing yet says 0, where the logits' exponentials sum to exp(14).
    "amorlip, js_div, average": f"{AMORLIP} --lambda_loss_type js_div --no-fit_w_prev --lambda_eps 14",
    "amorlip, every other step": f"{AMORLIP} --update_lambda_every_n_steps 2 --beta_decay_epochs 1",
    "amorlip, adaptive temperature": f"{AMORLIP} --adaptive_tau",
    "amorlip, no pair": f"{AMORLIP} --pos_coef 0 --no-scale_loss",
}
WORLD_SIZES = (1, 2, 4)
SAVED_ON = 2
ROUNDING = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Record]:
    """The reference: no process group, one process, the whole batch."""
    return {name: run(flags) for name, flags in VARIANTS.items()}


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, list[dict[str, Any]]]:
    """Results of run_all by number of ranks. The checkpoints that all continue from were written on SAVED_ON ranks."""
    first = run_on_ranks(run_all, SAVED_ON, VARIANTS, {})
    checkpoints = {name: record.checkpoint for name, record in first[0]["runs"].items()}
    others = {size: run_on_ranks(run_all, size, VARIANTS, checkpoints) for size in WORLD_SIZES if size != SAVED_ON}
    return {SAVED_ON: first, **others}


def assert_equal(value: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor):
        # Next to large elements, what is left of a sum that cancels is as exact as they are.
        largest = float(expected.abs().max()) if expected.is_floating_point() and expected.numel() else 1.0
        atol = ROUNDING["atol"] * max(1.0, largest)
        torch.testing.assert_close(
            value, expected, rtol=ROUNDING["rtol"], atol=atol, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(expected, dict):
        assert value.keys() == expected.keys(), where
        for key in expected:
            assert_equal(value[key], expected[key], f"{where}, {key}")
    else:
        assert value == expected, where


def combined(name: str, values: list[Tensor]) -> Tensor:
    """A metric of the global batch from those of the ranks, as the contract says."""
    stack = torch.stack(values)
    return stack.max() if name.endswith("_max") else stack.mean()


def assert_ranks_equal_one_process(ranks: list[Record], expected: Record) -> None:
    for step, loss in enumerate(expected.losses):
        assert_equal(torch.stack([record.losses[step] for record in ranks]).mean(), loss, f"step {step}, loss")
        for rank, record in enumerate(ranks):
            assert_equal(record.gradients[step], expected.gradients[step], f"step {step}, rank {rank}, gradient")
            assert record.metrics[step].keys() == expected.metrics[step].keys()
        for name, metric in expected.metrics[step].items():
            value = combined(name, [record.metrics[step][name] for record in ranks])
            assert_equal(value, metric, f"step {step}, metric {name}")
    for rank, record in enumerate(ranks):
        assert_equal(record.state, expected.state, f"rank {rank}, state")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_equal_one_process(
    variant: str, world_size: int, on_ranks: dict[int, list[dict[str, Any]]], one_process: dict[str, Record]
) -> None:
    expected = one_process[variant]
    assert len(expected.losses) == STEPS
    assert all(gradient.abs().max() > 1e-6 for gradient in expected.gradients[-1].values())
    own = [name for name in expected.gradients[-1] if name.startswith("objective.")]
    assert bool(own) == ("simultaneous" in variant)
    assert_ranks_equal_one_process([result["runs"][variant] for result in on_ranks[world_size]], expected)


@pytest.mark.parametrize("world_size", [size for size in WORLD_SIZES if size != SAVED_ON])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_continues_on_another_number_of_ranks(
    variant: str, world_size: int, on_ranks: dict[int, list[dict[str, Any]]], one_process: dict[str, Record]
) -> None:
    expected = run(VARIANTS[variant], one_process[variant].checkpoint)
    assert len(expected.losses) == 1
    assert_ranks_equal_one_process([result["continued"][variant] for result in on_ranks[world_size]], expected)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_hold_the_same_state_to_the_last_bit(
    variant: str, world_size: int, on_ranks: dict[int, list[dict[str, Any]]]
) -> None:
    """Replicas that differ by a rounding error drift apart, and the checkpoint of rank 0 would stand for none of them."""
    states = [result["runs"][variant].state for result in on_ranks[world_size]]
    for state in states[1:]:
        for name, value in states[0].items():
            assert torch.equal(state[name], value) if isinstance(value, Tensor) else state[name] == value, name


def test_every_registered_objective_is_among_the_variants() -> None:
    assert set(OBJECTIVES) <= set(VARIANTS)


NEUCLIP_VARIANTS = [name for name in VARIANTS if name.startswith("neuclip")]


def messages_of_a_pass(normalizer: NormalizerNetwork, step: int, local: int, world_size: int) -> dict[str, list[Any]]:
    """(collective, numbers that a rank puts in) of an NPN: for a prediction, an inner update, and for both together."""
    if isinstance(normalizer, MLPNormalizer):
        # Data parallel: all weights' gradient.
        gradient = ("all_reduce", normalizer.mlp.weights.numel())
        gathered = ("all_gather_into_tensor", 2 * local)
        return {"prediction": [gathered], "update": [gradient], "together": [gradient, gathered]}
    assert isinstance(normalizer, PrototypeNormalizer)
    # Each rank's part of both means for all N anchors; m and d do not occur.
    sums = ("all_reduce", 2 * GLOBAL_BATCH)
    norms = [("all_reduce", 2)] if isinstance(normalizer.optimizer, UnitRowsAdaGradNorm) else []
    slots = -(-min(normalizer.num_prototypes, (step + 1) * GLOBAL_BATCH) // world_size)
    rows = ("all_gather_into_tensor", 2 * slots * EMBED_DIM)
    return {"prediction": [sums], "update": [sums, *norms], "together": [sums, rows]}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("variant", NEUCLIP_VARIANTS)
def test_messages_of_a_neuclip_step(variant: str, world_size: int, on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    """Features once, packed; the batch's own normalizers; the NPN's updates; its prediction, which all ranks have then.

    Whatever a rank puts into a collective is counted, on every rank.
    """
    shape = RunShape(EMBED_DIM, GLOBAL_BATCH // world_size, world_size, 2, 4)
    objective = make_objective(VARIANTS[variant], shape)
    assert isinstance(objective, NeuCLIP)
    optimization, local = objective.optimization, shape.batch_size
    assert isinstance(optimization, Alternating) == ("simultaneous" not in variant)
    for result in on_ranks[world_size]:
        for step, found in enumerate(result["messages"][variant]):
            passes = messages_of_a_pass(objective.normalizer, step, local, world_size)
            if isinstance(optimization, Alternating):
                learning = [*passes["update"] * optimization.repetitions, *passes["prediction"]]
            else:
                learning = passes["together"]
            gathered = [("all_gather_into_tensor", 2 * local * width) for width in (EMBED_DIM, 1)]
            assert [message[:2] for message in found] == [*gathered, *learning]


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_of_an_inner_update(world_size: int, on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    """2N numbers of eight bytes and the two norms, whatever m and d: here m·d is 240, for the paper's run 2,097,152."""
    updates = 3
    for result in on_ranks[world_size]:
        for found in result["messages"]["neuclip, m>N"]:
            reduced = [num_bytes for name, _, num_bytes in found if name == "all_reduce"]
            # The objective is in float64: its norms have eight bytes too.
            assert sum(reduced) == updates * (2 * GLOBAL_BATCH * 8 + 2 * 8) + 2 * GLOBAL_BATCH * 8


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("variant", [name for name in NEUCLIP_VARIANTS if "mlp" not in name])
def test_a_prototype_lives_on_one_rank_only(
    variant: str, world_size: int, on_ranks: dict[int, list[dict[str, Any]]]
) -> None:
    """With its optimizer's state and what is remembered for restarts; an outer optimizer needs its parameters everywhere."""
    rows = [result["prototypes_held"][variant] for result in on_ranks[world_size]]
    whole = on_ranks[world_size][0]["runs"][variant].state["normalizer.prototypes"].shape[1]
    for name in ("prototypes", "recent", "accumulator"):
        held = [found[name] for found in rows]
        if "simultaneous" in variant or max(held) == 0:
            assert all(count in (0, whole) for count in held)
        else:
            assert sum(held) == whole
            assert max(held) - min(held) <= 1


AMORLIP_VARIANTS = [name for name in VARIANTS if name.startswith("amorlip")]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("variant", AMORLIP_VARIANTS)
def test_messages_of_an_amorlip_step(variant: str, world_size: int, on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    """Features cross once, packed; the networks' gradient once per inner update; then the log-normalizers."""
    local = GLOBAL_BATCH // world_size
    objective = make_objective(VARIANTS[variant], RunShape(EMBED_DIM, local, world_size, 2, 4))
    assert isinstance(objective, AmorLIP)
    gradient = ("all_reduce", objective.normalizer.current.weights.numel())
    for result in on_ranks[world_size]:
        for step, found in enumerate(result["messages"][variant]):
            updates = 0 if step % objective.settings.update_every else objective.settings.updates[0]
            features, normalizers = (("all_gather_into_tensor", 2 * local * width) for width in (EMBED_DIM, 1))
            assert [message[:2] for message in found] == [features, *[gradient] * updates, normalizers]


FASTCLIP_VARIANTS = [name for name in VARIANTS if name.startswith(("fastclip", "sogclr", "isogclr"))]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("variant", FASTCLIP_VARIANTS)
def test_messages_of_a_fastclip_step(variant: str, world_size: int, on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    """Features once, packed; keys; the batch's rows of the tables; its estimates; for v2 the temperatures' gradient."""
    local = GLOBAL_BATCH // world_size
    individual = "individual_learnable" in VARIANTS[variant]
    sizes = [2 * local * EMBED_DIM, local, 2 * local]
    gathered = [("all_gather_into_tensor", size) for size in sizes]
    rows = ("all_reduce", GLOBAL_BATCH * (8 if individual else 2))
    last = [("all_gather_into_tensor", 2 * local)] if individual else []
    for result in on_ranks[world_size]:
        for found in result["messages"][variant]:
            assert [message[:2] for message in found] == [*gathered[:2], rows, gathered[2], *last]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_row_lives_on_one_rank_only(world_size: int, on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    counts = [result["rows_held"] for result in on_ranks[world_size]]
    assert sum(counts) == DATA_SIZE
    assert max(counts) == -(-DATA_SIZE // world_size)


@pytest.mark.parametrize("variant", NEUCLIP_VARIANTS + AMORLIP_VARIANTS + FASTCLIP_VARIANTS)
def test_one_rank_sends_nothing(variant: str, on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    assert on_ranks[1][0]["messages"][variant] == [[], [], [], []]
