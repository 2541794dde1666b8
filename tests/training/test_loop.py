"""The loop: one update is the same on any number of ranks; clipping, clamping, seeding, what is logged and when."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from neuclip.objectives import OBJECTIVES
from ranks import run_on_ranks
from small_training import CPU, FrozenTowers, make_args, make_batches, make_training
from training.distributed import World
from training.loop import train_one_epoch, training_step

# Plain gradient descent shows the gradient itself, with its scale.
DESCENT = ("--optimizer", "sgd", "--momentum", "0", "--lr", "0.1", "--lr_tau", "0.1", "--wd", "0", "--skip-scheduler")


def _flags(objective: str) -> tuple[str, ...]:
    return ("--objective", objective, "--npn_num_protos", "8", "--npn_restart_iter", "3", "--epochs", "2")


def _train(objective: str) -> dict[str, Tensor]:
    """Three updates; on as many ranks as there are. Returns the weights."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU) if dist.is_initialized() else World(0, 1, CPU)
    training = make_training(make_args(*_flags(objective), *DESCENT), make_batches(3, 8), world)
    train_one_epoch(training, 0)
    return {name: value.detach().clone() for name, value in training.state.towers.state_dict().items()}


def train_every_objective(objectives: list[str]) -> list[dict[str, Tensor]]:
    """What a rank does."""
    return [_train(objective) for objective in objectives]


def test_update_does_not_depend_on_the_number_of_ranks() -> None:
    names = list(OBJECTIVES)
    alone = train_every_objective(names)
    for rank in run_on_ranks(train_every_objective, 2, names):
        for objective, expected, found in zip(names, alone, rank):
            for name in expected:
                torch.testing.assert_close(
                    found[name], expected[name], rtol=2e-5, atol=2e-6, msg=f"{objective}: {name}"
                )


def test_step_is_the_gradient_of_the_loss() -> None:
    """Against autograd on the towers alone, for the one objective whose loss is autograd's own."""
    (batch,) = make_batches(1, 8)
    training = make_training(make_args(*DESCENT), [batch])
    reference = make_training(make_args(*DESCENT), [batch]).state.towers
    image, text, scale, _ = reference(batch.image, batch.text)
    logits = scale * image @ text.T
    labels = torch.arange(8)
    loss = (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    training.rates.set(0)
    training_step(training, batch)
    for (name, moved), before in zip(training.state.towers.named_parameters(), reference.parameters()):
        assert before.grad is not None
        torch.testing.assert_close(moved, before - 0.1 * before.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_are_clipped_together() -> None:
    training = make_training(make_args(*DESCENT, "--grad-clip-norm", "0.01"), make_batches(1, 8))
    before = [p.detach().clone() for p in training.state.towers.parameters()]
    train_one_epoch(training, 0)
    moved = torch.cat([(p - q).flatten() for p, q in zip(training.state.towers.parameters(), before)])
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(("start", "clamped"), [(7.0, math.log(100)), (-3.0, 0.0)])
def test_temperature_is_clamped_after_the_step(start: float, clamped: float) -> None:
    training = make_training(make_args(*DESCENT, "--lr_tau", "1e-9"), make_batches(1, 8))
    training.state.towers.model.logit_scale.data.fill_(start)
    train_one_epoch(training, 0)
    assert training.state.towers.model.logit_scale.item() == pytest.approx(clamped)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_constant_temperature_stays(objective: str) -> None:
    args = make_args(*_flags(objective), *DESCENT)
    training = make_training(args, make_batches(3, 8))
    training.state.towers.model.logit_scale.requires_grad_(False)
    train_one_epoch(training, 0)
    assert training.state.towers.model.logit_scale.item() == 2.0


def test_global_constant_scheme_keeps_the_temperature() -> None:
    args = make_args(*_flags("neuclip"), *DESCENT, "--temperature_scheme", "global_constant")
    training = make_training(args, make_batches(3, 8))
    train_one_epoch(training, 0)
    assert training.state.towers.model.logit_scale.item() == 2.0
    assert {group["role"] for group in training.state.optimizer.param_groups} == {"decay", "no_decay"}
    assert "lr_tau" not in training.reporter.lines[0][1]  # type: ignore[attr-defined]


def test_logs_first_last_and_every_nth_step() -> None:
    training = make_training(make_args("--log-every-n-steps", "3", "--epochs", "2"), make_batches(7, 4))
    for epoch in range(2):
        train_one_epoch(training, epoch)
    lines = training.reporter.lines  # type: ignore[attr-defined]
    assert [step for step, _ in lines] == [1, 3, 6, 7, 8, 10, 13, 14]
    assert [line["epoch"] for _, line in lines] == pytest.approx([n / 7 for n in (1, 3, 6, 7, 8, 10, 13, 14)])
    assert [line["samples"] for _, line in lines] == [4 * n for n in (1, 3, 6, 7, 8, 10, 13, 14)]
    for _, line in lines:
        assert {"loss", "temperature", "lr", "lr_tau", "samples_per_second", "data_wait_share"} <= line.keys()
        assert 0 <= line["data_wait_share"] <= 1


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_logs_the_time_of_the_objective(objective: str) -> None:
    training = make_training(make_args(*_flags(objective), "--log-every-n-steps", "2"), make_batches(6, 4))
    train_one_epoch(training, 0)
    has_normalizer = objective in ("fastclip", "neuclip", "amorlip")
    for _, line in training.reporter.lines:  # type: ignore[attr-defined]
        assert 0 < line["objective_seconds"] < line["seconds_per_step"]
        assert ("normalizer_seconds" in line) == has_normalizer
        assert 0 <= line.get("normalizer_seconds", 0.0) < line["objective_seconds"]


def test_temperature_alone_can_learn() -> None:
    training = make_training(make_args("--epochs", "2"), make_batches(2, 4), model_class=FrozenTowers)
    train_one_epoch(training, 0)
    assert training.state.towers.model.logit_scale.item() != 2.0
    assert "lr" not in training.reporter.lines[0][1]  # type: ignore[attr-defined]


def test_samples_count_all_micro_batches() -> None:
    training = make_training(make_args("--log-every-n-steps", "1", "--accum-freq", "2"), make_batches(3, 8))
    train_one_epoch(training, 0)
    lines = [line for _, line in training.reporter.lines]  # type: ignore[attr-defined]
    assert [line["samples"] for line in lines] == [8, 16, 24]
    for line in lines:
        assert line["samples_per_second"] * line["seconds_per_step"] == pytest.approx(8)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_unlogged_steps_report_nothing(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(make_args(*_flags(objective), "--log-every-n-steps", "100"), make_batches(5, 4))
    outputs = []
    original = training.state.objective.forward

    def watched(*given: Tensor) -> object:
        outputs.append(original(*given))
        return outputs[-1]

    monkeypatch.setattr(training.state.objective, "forward", watched)
    train_one_epoch(training, 0)
    assert [bool(output.metrics) for output in outputs] == [True, False, False, False, True]


def test_epoch_starts_from_a_random_state_of_its_own() -> None:
    states = []
    for epoch in (0, 1, 1):
        torch.rand(17)
        training = make_training(make_args("--seed", "4", "--epochs", "2"), make_batches(1, 4))
        train_one_epoch(training, epoch)
        states.append(torch.rand(3).tolist())
    assert states[0] != states[1]
    assert states[1] == states[2]


def test_objective_is_told_the_epoch() -> None:
    training = make_training(make_args("--epochs", "3"), make_batches(2, 4))
    train_one_epoch(training, 2)
    assert training.state.objective.epoch == 2
    assert training.state.objective.step == 2
    assert training.state.step == 2


def test_log_line_names_what_a_reader_looks_for(caplog: pytest.LogCaptureFixture) -> None:
    args = make_args("--epochs", "2", "--name", "run")
    with caplog.at_level(logging.INFO):
        train_one_epoch(make_training(args, make_batches(2, 4)), 0)
    line = caplog.messages[-1]
    for part in ("epoch 1/2", "step 2/2", "loss", "contrastive_loss", "global_loss", "τ", "lr ", "samples/s", "ETA"):
        assert part in line


def test_profile_goes_into_the_run_folder(tmp_path: Path) -> None:
    args = make_args("--profile", "--logs", str(tmp_path), "--name", "run", "--epochs", "1")
    (tmp_path / "run").mkdir()
    train_one_epoch(make_training(args, make_batches(9, 4)), 0)
    assert (tmp_path / "run" / "profile.json").stat().st_size > 0
