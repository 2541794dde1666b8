"""The NeuCLIP objective against an independent implementation of Algorithm 1, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from neuclip import RunShape, make_objective
from neuclip.objectives.neuclip import NeuCLIP

from .conftest import FeatureMaker
from .reference import ReferenceNeuCLIP

N, DIM, STEPS_PER_EPOCH, EPOCHS = 6, 5, 3, 3
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def reference_gamma(schedule: str, gamma: float, decay_epochs: float) -> Callable[[int, int], float]:
    def cosine(elapsed: float) -> float:
        if elapsed >= decay_epochs:
            return gamma
        return 0.5 * (1 + math.cos(math.pi * elapsed / decay_epochs)) * (1 - gamma) + gamma

    return {
        "constant": lambda epoch, step: gamma,
        "cosine": lambda epoch, step: cosine(epoch),
        "cosine_step": lambda epoch, step: cosine(step / STEPS_PER_EPOCH),
    }[schedule]


# m, T_r, T_u, optimizer, weight decay, γ schedule, γ, ε
CASES = {
    "m<N": (4, 3, 3, "adagrad_norm", 0.0, "constant", 0.0, 1e-8),
    "m=N": (6, 3, 3, "adagrad_norm", 0.0, "cosine", 0.3, 1e-8),
    "m>N": (15, 3, 2, "adagrad_norm", 0.0, "cosine_step", 0.42, 1e-8),
    "m=2N, no later restart": (12, 0, 2, "adagrad_norm", 0.0, "constant", 0.3, 1e-8),
    "m=1": (1, 4, 4, "adagrad_norm", 0.0, "constant", 0.0, 1e-8),
    "restart every step": (6, 1, 2, "adagrad_norm", 0.0, "constant", 0.5, 1e-8),
    "no update": (9, 2, 0, "adagrad_norm", 0.0, "constant", 0.0, 1e-8),
    "eps=0": (4, 3, 2, "adagrad_norm", 0.0, "constant", 0.2, 0.0),
    "large eps": (7, 3, 2, "adagrad_norm", 0.0, "constant", 0.2, 0.5),
    "adagrad, m<N": (4, 3, 3, "adagrad", 0.0, "constant", 0.0, 1e-8),
    "adagrad, m>N": (15, 4, 2, "adagrad", 0.0, "cosine", 0.42, 1e-8),
    "adagrad, weight decay": (9, 5, 3, "adagrad", 0.05, "cosine", 0.2, 1e-8),
    "adagrad, no later restart": (6, 0, 3, "adagrad", 0.0, "cosine_step", 0.1, 1e-8),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_reference(case: str, features: FeatureMaker) -> None:
    m, restart, updates, optimizer, weight_decay, schedule, gamma, eps = CASES[case]
    # Coordinate-wise, a first step of 1 takes the prototypes far away; 0.1 keeps them where all terms matter.
    lr = 1.0 if optimizer == "adagrad_norm" else 0.1
    flags = (
        f"--objective neuclip --npn_num_protos {m} --npn_restart_iter {restart} --npn_repetition {updates} "
        f"--npn_optimizer {optimizer} --npn_lr {lr} --npn_wd {weight_decay} --gamma {gamma} --gamma_schedule {schedule} "
        f"--gamma_decay_epochs 2 --fastclip_eps {eps} --rho 6.5"
    )
    objective = make_objective(flags, RunShape(DIM, N, 1, STEPS_PER_EPOCH, EPOCHS)).double()
    assert isinstance(objective, NeuCLIP)
    reference = ReferenceNeuCLIP(
        m, updates, restart, eps, 6.5, lr, reference_gamma(schedule, gamma, 2.0), optimizer, weight_decay
    )
    for step in range(7):
        epoch = step // STEPS_PER_EPOCH
        if step % STEPS_PER_EPOCH == 0:
            objective.start_epoch(epoch)
        images, texts = features(step, N, DIM)
        # The temperature changes during training, too.
        logit_scale = torch.tensor(8.0 + step, dtype=torch.float64, requires_grad=True)
        expected = reference.step(images, texts, logit_scale, epoch)
        output = objective(images, texts, logit_scale)
        gradients = torch.autograd.grad(output.loss, (images, texts, logit_scale))

        torch.testing.assert_close(output.loss.detach(), expected.loss, **EXACT)
        for name, value, target in zip(("images", "texts", "logit_scale"), gradients, expected.gradients):
            torch.testing.assert_close(value, target, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}", **EXACT)
        npn = objective.normalizer
        active = len(reference.prototypes[0])
        assert npn.active == active
        for k in range(2):
            torch.testing.assert_close(npn.prototypes[k, :active], reference.prototypes[k].detach(), **EXACT)
            accumulator = npn.optimizer.accumulator[k]
            target = reference.accumulators[k]
            torch.testing.assert_close(accumulator[:active] if accumulator.dim() else accumulator, target, **EXACT)
            if accumulator.dim():
                assert not accumulator[active:].any()

        alpha = torch.stack(expected.alpha)
        estimate = torch.log(eps + torch.stack(expected.g))
        metrics = {name: float(value) for name, value in output.metrics.items()}
        assert metrics["global_loss"] == pytest.approx(float(expected.tau * (alpha.mean() + 6.5)), rel=1e-10)
        assert metrics["log_normalizer"] == pytest.approx(float(alpha.mean()), rel=1e-10)
        assert metrics["log_normalizer_gap"] == pytest.approx(
            float((alpha - estimate).abs().mean()), rel=1e-8, abs=1e-12
        )
        assert metrics["log_normalizer_gap_max"] == pytest.approx(
            float((alpha - estimate).abs().max()), rel=1e-8, abs=1e-12
        )
        assert metrics["gamma"] == pytest.approx(reference.gamma(epoch, step), rel=1e-12)


@pytest.mark.parametrize("optimizer", ["adagrad_norm", "adagrad"])
def test_a_constant_temperature_is_declared_but_the_gradient_stays(optimizer: str, features: FeatureMaker) -> None:
    objective = make_objective(
        f"--objective neuclip --npn_num_protos 4 --npn_optimizer {optimizer} --temperature_scheme global_constant",
        RunShape(DIM, N, 1, STEPS_PER_EPOCH, EPOCHS),
    ).double()
    assert objective.temperature_learning.name == "CONSTANT"
    images, texts = features(0, N, DIM)
    objective(images, texts, torch.tensor(10.0, dtype=torch.float64)).loss.backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
