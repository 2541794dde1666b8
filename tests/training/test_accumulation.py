"""--accum-freq: a step of k micro-batches is the step of the whole batch, for everything that learns or remembers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.checkpoint import checkpoint

from neuclip.objectives import OBJECTIVES, Output
from ranks import run_on_ranks
from small_training import (
    ALONE,
    CPU,
    EMBED_DIM,
    FrozenImage,
    FrozenTowers,
    SmallModel,
    make_args,
    make_batches,
    make_training,
)
from training.accumulation import split_batch
from training.data import Batch
from training.distributed import World
from training.loop import Training, train_one_epoch, training_step
from training.model import TwoTowers

STEPS, BATCH = 4, 16
# Plain gradient descent: Adam would turn rounding errors of vanishing gradients into steps.
DESCENT = ("--optimizer", "sgd", "--momentum", "0", "--lr", "0.1", "--lr_tau", "0.1", "--wd", "0", "--skip-scheduler")
# A restart among the steps.
STATE = ("--npn_num_protos", "8", "--npn_restart_iter", "3", "--data_size", "64", "--log-every-n-steps", "1")
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


class ExactTowers(TwoTowers):
    """Towers that compute and hand out float64, so that nothing but rounding to 1e-16 stays between equal things."""

    def __init__(self, model: nn.Module, logit_bias: float | None = None) -> None:
        super().__init__(model, logit_bias)
        self.double()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        features = [self.model.encode_image(image.double()), self.model.encode_text(text)]
        image_features, text_features = (F.normalize(x, dim=-1) for x in features)
        return image_features, text_features, self.model.logit_scale.exp(), self.logit_bias


class Dropout(SmallModel):
    """Random zeros in both towers, as dropout and patch dropout bring them."""

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return super().encode_image(F.dropout(image, 0.3, self.training))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return F.dropout(super().encode_text(text), 0.3, self.training)


class Checkpointed(Dropout):
    """Activations of the image tower, random zeros included, are computed again in backward."""

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return checkpoint(super().encode_image, image, use_reentrant=False)


class BatchNorm(Dropout):
    """Running statistics in the image tower; those of `cumulative` are plain means over all batches."""

    def __init__(self, logit_bias: float | None = None) -> None:
        super().__init__(logit_bias)
        self.moving = nn.BatchNorm1d(EMBED_DIM)
        self.cumulative = nn.BatchNorm1d(EMBED_DIM, momentum=None)
        self.frozen = nn.BatchNorm1d(EMBED_DIM).eval()

    def train(self, mode: bool = True) -> BatchNorm:
        super().train(mode)
        self.frozen.eval()
        return self

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return self.frozen(self.cumulative(self.moving(super().encode_image(image)).square()))


def _flags(objective: str, parts: int) -> tuple[str, ...]:
    return ("--objective", objective, *DESCENT, *STATE, "--epochs", "2", "--accum-freq", str(parts))


def _exact_training(
    objective: str, parts: int, *flags: str, model_class: type[SmallModel] = SmallModel, world: World = ALONE
) -> Training:
    training = make_training(
        make_args(*_flags(objective, parts), *flags),
        make_batches(STEPS, BATCH),
        world,
        towers_class=ExactTowers,
        model_class=model_class,
    )
    training.state.objective.double()
    return training


def _gradients(training: Training) -> dict[str, Tensor]:
    modules = nn.ModuleDict({"towers": training.state.towers, "objective": training.state.objective})
    return {name: p.grad.detach().clone() for name, p in modules.named_parameters() if p.grad is not None}


def _record(training: Training) -> dict[str, Any]:
    """One epoch: the gradient of every parameter and what is logged, step by step, and all state at the end."""
    gradients: list[dict[str, Tensor]] = []
    training.state.optimizer.register_step_pre_hook(lambda *_: gradients.append(_gradients(training)))
    train_one_epoch(training, 0)
    timings = ("samples_per_second", "seconds_per_step", "data_wait_share", "objective_seconds", "normalizer_seconds")
    logged = [{k: v for k, v in line.items() if k not in timings} for _, line in training.reporter.lines]  # type: ignore[attr-defined]
    return {
        "gradients": gradients,
        "logged": logged,
        "towers": training.state.towers.state_dict(),
        "objective": training.state.objective.state_dict(),
    }


def _assert_equal(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            _assert_equal(found[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected)):
            _assert_equal(one, other, f"{where}, {index}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, msg=lambda text: f"{where}: {text}", **ROUNDING)
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), where


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_micro_batches_are_the_whole_batch(objective: str, parts: int) -> None:
    whole, found = (_record(_exact_training(objective, number)) for number in (1, parts))
    assert len(whole["gradients"]) == STEPS
    assert "towers.model.logit_scale" in whole["gradients"][0]
    assert any("bias" in name for name in whole["gradients"][0])
    assert all(gradient.abs().max() > 0 for gradient in whole["gradients"][0].values())
    _assert_equal(found, whole)


@pytest.mark.parametrize("model_class", [FrozenImage, FrozenTowers])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_frozen_towers(objective: str, model_class: type[SmallModel]) -> None:
    whole, found = (_record(_exact_training(objective, parts, model_class=model_class)) for parts in (1, 4))
    assert "towers.model.visual.weight" not in whole["gradients"][0]
    assert "towers.model.logit_scale" in whole["gradients"][0]
    _assert_equal(found, whole)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_constant_temperature(objective: str) -> None:
    def run(parts: int) -> dict[str, Any]:
        training = _exact_training(objective, parts)
        training.state.towers.model.logit_scale.requires_grad_(False)
        return _record(training)

    whole, found = run(1), run(4)
    assert "towers.model.logit_scale" not in whole["gradients"][0]
    _assert_equal(found, whole)


def test_temperatures_of_single_samples() -> None:
    flags = ("--temperature_scheme", "individual_learnable")
    whole, found = (_record(_exact_training("fastclip", parts, *flags)) for parts in (1, 4))
    assert "towers.model.logit_scale" not in whole["gradients"][0]
    _assert_equal(found, whole)


def test_bias_of_the_architecture() -> None:
    def run(parts: int) -> dict[str, Any]:
        args = make_args(*_flags("siglip", parts))
        return _record(make_training(args, make_batches(STEPS, BATCH), towers_class=ExactTowers, logit_bias=-10.0))

    whole, found = run(1), run(4)
    assert "towers.model.logit_bias" in whole["gradients"][0]
    _assert_equal(found, whole)


@pytest.mark.parametrize("flags", [("--grad-clip-norm", "0.01"), ("--optimizer", "adamw")], ids=" ".join)
def test_what_follows_the_gradient_sees_the_whole(flags: tuple[str, ...]) -> None:
    whole, found = (_record(_exact_training("openclip", parts, *flags)) for parts in (1, 4))
    _assert_equal(found, whole)


def _one_graph(training: Training, batch: Batch) -> dict[str, Tensor]:
    """The gradient by autograd alone: each micro-batch through the towers, all graphs kept, one backward pass."""
    towers, objective = training.state.towers, training.state.objective
    encoded = [towers(part.image, part.text) for part in split_batch(batch, training.args.accum_freq)]
    images, texts = (torch.cat(part) for part in list(zip(*encoded))[:2])
    objective(images, texts, *encoded[0][2:], batch.keys).loss.backward()
    return _gradients(training)


@pytest.mark.parametrize("model_class", [Dropout, Checkpointed, BatchNorm])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_second_pass_repeats_the_first(objective: str, model_class: type[SmallModel]) -> None:
    """The same random zeros, running statistics of one pass, and a random state that goes on after one pass."""
    expected, found = (_exact_training(objective, 4, model_class=model_class) for _ in range(2))
    (batch,) = make_batches(1, BATCH)
    torch.manual_seed(3)
    gradients = _one_graph(expected, batch)
    state = torch.get_rng_state()

    seen: list[dict[str, Tensor]] = []
    found.state.optimizer.register_step_pre_hook(lambda *_: seen.append(_gradients(found)))
    torch.manual_seed(3)
    training_step(found, batch)
    assert torch.equal(torch.get_rng_state(), state)
    _assert_equal(seen, [gradients])
    buffers = [dict(training.state.towers.named_buffers()) for training in (found, expected)]
    _assert_equal(*buffers)
    if model_class is BatchNorm:
        assert buffers[0]["model.moving.num_batches_tracked"] == 4
        assert buffers[0]["model.frozen.num_batches_tracked"] == 0
        assert all(
            part.track_running_stats for part in (found.state.towers.model.moving, found.state.towers.model.frozen)
        )


def test_random_numbers_of_the_objective_are_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    training = _exact_training("openclip", 2, model_class=Dropout)
    forward, drawn = training.state.objective.forward, []

    def draws(*given: Any) -> Output:
        drawn.append(torch.rand(3))
        return forward(*given)

    monkeypatch.setattr(training.state.objective, "forward", draws)
    for batch in make_batches(2, BATCH):
        training_step(training, batch)
        drawn.append(torch.rand(3))
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 4


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_objective_is_called_once_with_everything(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = _exact_training(objective, 4)
    forward, calls = training.state.objective.forward, []

    def watched(*given: Tensor) -> Output:
        calls.append(given)
        return forward(*given)

    monkeypatch.setattr(training.state.objective, "forward", watched)
    batches = make_batches(2, BATCH)
    for batch in batches:
        training_step(training, batch)
    assert len(calls) == 2
    for (images, texts, logit_scale, logit_bias, keys), batch in zip(calls, batches):
        assert images.shape == texts.shape == (BATCH, EMBED_DIM)
        assert logit_scale.shape == ()
        assert (logit_bias is None) == (OBJECTIVES[objective].initial_logit_bias is None)
        assert torch.equal(keys, batch.keys)
    assert training.state.objective.step == 2


def test_batch_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = make_batches(1, BATCH)
    output = training_step(_exact_training("openclip", 4), batch._replace(keys=None))
    assert math.isfinite(output.loss.item())


def test_parameters_of_the_objective_get_their_gradient() -> None:
    """They get it from the objective's one call, and the towers' second pass adds nothing to it."""

    class Learning(OBJECTIVES["openclip"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.stretch = nn.Parameter(torch.ones(EMBED_DIM, dtype=torch.float64))

        def compute(self, image_features: Tensor, *others: Any) -> Output:
            return super().compute(image_features * self.stretch, *others)

    def run(parts: int) -> list[dict[str, Tensor]]:
        training = _exact_training("openclip", parts)
        training.state.objective = Learning()
        training.state.optimizer.add_param_group(
            {"params": training.state.objective.parameters(), "lr": 0.1, "role": "decay"}
        )
        return _record(training)["gradients"]

    whole, found = run(1), run(4)
    assert all("objective.stretch" in gradients for gradients in whole)
    _assert_equal(found, whole)


def test_scaled_gradients() -> None:
    """float16 needs a scaler; in float64 its factor, a power of two, leaves no trace."""

    def run(parts: int) -> dict[str, Any]:
        training = _exact_training("openclip", parts)
        training.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        unscaled = _record(training)
        assert training.state.scaler.get_scale() == 2.0**12
        return unscaled

    _assert_equal(run(4), run(1))


@pytest.mark.parametrize("precision", ["amp", "amp_bf16"])
def test_autocast(precision: str) -> None:
    """Weights that autocast has converted for the pass without a graph must not serve the one with it."""

    def run(parts: int) -> Training:
        args = make_args(*_flags("openclip", parts), "--precision", precision)
        training = make_training(args, make_batches(STEPS, BATCH))
        train_one_epoch(training, 0)
        return training

    expected, found = run(1).state.towers.state_dict(), run(4).state.towers.state_dict()
    for name, start in SmallModel().state_dict().items():
        assert name == "norm.bias" or not torch.equal(found[f"model.{name}"], start), f"{name} has not learnt"
        torch.testing.assert_close(found[f"model.{name}"], expected[f"model.{name}"], rtol=0.02, atol=0.02)


def _world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), CPU)


def record_on_ranks(objectives: list[str], parts: int) -> list[dict[str, Any]]:
    """What a rank does: an epoch with every objective, with the number of buckets that it reduced."""
    records = []
    for objective in objectives:
        training = _exact_training(objective, parts, world=_world())
        reduced: list[int] = []

        def count(group, bucket, reduced=reduced):  # type: ignore[no-untyped-def]  # DDP reads annotations
            reduced.append(bucket.index())
            return allreduce_hook(group, bucket)

        training.model.register_comm_hook(dist.group.WORLD, count)
        records.append({**_record(training), "reduced": len(reduced)})
    return records


def test_two_ranks_are_one_process() -> None:
    names = list(OBJECTIVES)
    alone = [_record(_exact_training(objective, 1)) for objective in names]
    for rank in run_on_ranks(record_on_ranks, 2, names, 4):
        for objective, expected, found in zip(names, alone, rank):
            assert found.pop("reduced") == STEPS, "gradients are averaged over the ranks once a step"
            _assert_equal(found, expected, objective)


def running_statistics_on_ranks() -> dict[str, Tensor]:
    """What a rank does: the statistics after an epoch. Between the steps DDP hands out those of rank 0."""
    training = _exact_training("openclip", 4, model_class=BatchNorm, world=_world())
    train_one_epoch(training, 0)
    return {name: value.clone() for name, value in training.state.towers.named_buffers()}


def test_running_statistics_on_ranks_are_those_of_one_pass() -> None:
    for buffers in run_on_ranks(running_statistics_on_ranks, 2):
        assert buffers["model.moving.num_batches_tracked"] == 4 * STEPS
        assert buffers["model.cumulative.num_batches_tracked"] == 4 * STEPS


def test_micro_batches_follow_each_other() -> None:
    (batch,) = make_batches(1, 12)
    parts = split_batch(batch, 3)
    assert [len(part.image) for part in parts] == [4, 4, 4]
    for whole, pieces in zip(batch, zip(*parts)):
        assert torch.equal(torch.cat(pieces), whole)
    assert parts[0].image.data_ptr() == batch.image.data_ptr(), "nothing is copied"
    assert all(part.keys is None for part in split_batch(batch._replace(keys=None), 3))
