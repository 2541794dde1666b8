"""The NeuCLIP objective against an independent implementation of Algorithm 1, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from neuclip import RunShape, make_objective
from neuclip.normalizers import MLPNormalizer, NormalizerNetwork, PrototypeNormalizer, ResidualMLPs
from neuclip.objectives.neuclip import NeuCLIP

from .conftest import FeatureMaker
from .reference import OPTIMIZERS, MLPs, Prototypes, ReferenceNeuCLIP, Step

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


@dataclass(frozen=True)
class Case:
    """A run: m is None for the MLPs, optimizer for simultaneous optimization. lr is that of the NPN, whoever trains it."""

    m: int | None = 4
    restart: int = 3
    updates: int = 3
    optimizer: str | None = "adagrad_norm"
    weight_decay: float = 0.0
    schedule: str = "constant"
    gamma: float = 0.0
    eps: float = 1e-8
    inner: str = "unified"
    lr: float = 1.0

    def flags(self) -> str:
        """The command line."""
        flags = (
            f"--objective neuclip --npn_restart_iter {self.restart} --npn_wd {self.weight_decay} --gamma {self.gamma} "
            f"--gamma_schedule {self.schedule} --gamma_decay_epochs 2 --fastclip_eps {self.eps} --rho 6.5 "
            f"--npn_objective {self.inner} "
        )
        flags += "--npn_arch mlp " if self.m is None else f"--npn_num_protos {self.m} "
        if self.optimizer is None:
            return flags + "--npn_optimization simultaneous"
        return flags + f"--npn_repetition {self.updates} --npn_optimizer {self.optimizer} --npn_lr {self.lr}"


# Coordinate-wise, a first step of 1 takes the prototypes far away; 0.1 keeps them where all terms matter.
COORDINATES = Case(optimizer="adagrad", lr=0.1)
MLP = Case(m=None, restart=0, optimizer="adagrad", lr=0.02)
TOGETHER = Case(optimizer=None, updates=0, lr=0.05, gamma=0.2)
CASES = {
    "m<N": Case(),
    "m=N": Case(m=6, schedule="cosine", gamma=0.3),
    "m>N": Case(m=15, updates=2, schedule="cosine_step", gamma=0.42),
    "m=2N, no later restart": Case(m=12, restart=0, updates=2, gamma=0.3),
    "m=1": Case(m=1, restart=4, updates=4),
    "restart every step": Case(m=6, restart=1, updates=2, gamma=0.5),
    "no update": Case(m=9, restart=2, updates=0),
    "eps=0": Case(updates=2, gamma=0.2, eps=0.0),
    "large eps": Case(m=7, updates=2, gamma=0.2, eps=0.5),
    "adagrad, m<N": COORDINATES,
    "adagrad, m>N": replace(COORDINATES, m=15, restart=4, updates=2, schedule="cosine", gamma=0.42),
    "adagrad, weight decay": replace(COORDINATES, m=9, restart=5, weight_decay=0.05, schedule="cosine", gamma=0.2),
    "adagrad, no later restart": replace(COORDINATES, m=6, restart=0, schedule="cosine_step", gamma=0.1),
    "separate, m<N": Case(inner="separate"),
    "separate, m>N": Case(m=15, inner="separate", schedule="cosine_step", gamma=0.42),
    "separate, large eps": Case(m=7, inner="separate", eps=0.5),
    "separate, adagrad": replace(COORDINATES, inner="separate", weight_decay=0.05, eps=0.0),
    "mlp": MLP,
    "mlp, gamma": replace(MLP, schedule="cosine_step", gamma=0.42, weight_decay=0.05),
    "mlp, restarts": replace(MLP, restart=3, schedule="cosine", gamma=0.2),
    "mlp, restart every step": replace(MLP, restart=1, updates=1),
    "mlp, no update": replace(MLP, updates=0),
    "mlp, eps=0": replace(MLP, eps=0.0),
    "mlp, large eps": replace(MLP, eps=0.5),
    "mlp, adagrad_norm": Case(m=None, restart=2, lr=0.5, weight_decay=0.05),
    "mlp, separate": replace(MLP, inner="separate", gamma=0.3),
    "mlp, separate, adagrad_norm": Case(m=None, restart=4, lr=0.5, inner="separate", eps=0.5),
    "simultaneous, m<N": TOGETHER,
    "simultaneous, m>N": replace(TOGETHER, m=15, restart=4, weight_decay=0.1),
    "simultaneous, never full": replace(TOGETHER, m=100, weight_decay=0.1),
    "simultaneous, no later restart": replace(TOGETHER, m=12, restart=0, schedule="cosine_step", gamma=0.42),
    "simultaneous, separate": replace(TOGETHER, m=9, inner="separate", eps=0.5),
    "simultaneous, mlp": replace(TOGETHER, m=None, restart=0, lr=0.02, weight_decay=0.1),
    "simultaneous, mlp, separate, restarts": replace(TOGETHER, m=None, restart=3, lr=0.02, inner="separate", eps=0.0),
}


def mlp_outputs(weights: list[list[Tensor]], images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """λ1 and λ2 from the weights of both modalities, in the order of the module's buffers."""
    mlps = ResidualMLPs(DIM, DIM).double()
    stacked = [torch.stack(pair) for pair in zip(*weights)]
    names = [name for name, _ in mlps.named_buffers()]
    outputs = torch.func.functional_call(mlps, dict(zip(names, stacked)), (torch.stack((images, texts)),))
    return outputs[0], outputs[1]


def mlp_weights(restart: int) -> list[list[Tensor]]:
    mlps = ResidualMLPs(DIM, DIM)
    mlps.reinitialise(restart)
    return [[buffer[k].double() for buffer in mlps.buffers()] for k in range(2)]


def make_reference(case: Case) -> ReferenceNeuCLIP:
    network = MLPs(mlp_weights, mlp_outputs, case.eps) if case.m is None else Prototypes(case.m, DIM, case.eps)
    optimizer = None
    if case.optimizer is not None:
        optimizer = OPTIMIZERS[case.optimizer](network, case.lr, case.weight_decay)
    gamma = reference_gamma(case.schedule, case.gamma, 2.0)
    return ReferenceNeuCLIP(network, optimizer, case.inner, case.updates, case.restart, case.eps, rho=6.5, gamma=gamma)


def named_weights(normalizer: NormalizerNetwork) -> dict[str, Tensor]:
    """The weights of an NPN, [2, ...] each, whether they are buffers or parameters."""
    if isinstance(normalizer, PrototypeNormalizer):
        return {"prototypes": normalizer.prototypes}
    assert isinstance(normalizer, MLPNormalizer)
    return {**dict(normalizer.mlp.named_buffers()), **dict(normalizer.mlp.named_parameters())}


def assert_same_weights(normalizer: NormalizerNetwork, reference: ReferenceNeuCLIP, step: int) -> None:
    found = named_weights(normalizer)
    for k in range(2):
        assert len(found) == len(reference.network.weights[k])
        for (name, value), expected in zip(found.items(), reference.network.weights[k]):
            torch.testing.assert_close(
                value[k].detach(), expected.detach(), msg=lambda m, n=name: f"step {step}, {n}: {m}", **EXACT
            )


def assert_same_accumulators(normalizer: NormalizerNetwork, reference: ReferenceNeuCLIP) -> None:
    assert normalizer.optimizer is not None
    assert reference.optimizer is not None
    for accumulator, target in zip(normalizer.optimizer.accumulator, reference.optimizer.accumulators):
        torch.testing.assert_close(accumulator.flatten(), target, **EXACT)


def assert_same_metrics(
    metrics: dict[str, Tensor], expected: Step, gamma: float, eps: float, simultaneous: bool
) -> None:
    alpha = torch.stack(expected.alpha)
    gap = (alpha - torch.log(eps + torch.stack(expected.g))).abs()
    targets = {
        "global_loss": expected.tau * (alpha.mean() + 6.5),
        "log_normalizer": alpha.mean(),
        "log_normalizer_gap": gap.mean(),
        "log_normalizer_gap_max": gap.max(),
        "gamma": gamma,
        "temperature": expected.tau,
        "inner_loss_before": expected.inner_losses[0],
    }
    if not simultaneous:
        targets["inner_loss_after"] = expected.inner_losses[-1]
    assert metrics.keys() == targets.keys() | {"contrastive_loss"}
    for name, target in targets.items():
        assert float(metrics[name]) == pytest.approx(float(target), rel=1e-8, abs=1e-12), name


class OuterOptimizer:
    """AdamW on the objective's own parameters as a trainer has it, and another one on those of the reference."""

    def __init__(self, case: Case, objective: NeuCLIP, reference: ReferenceNeuCLIP) -> None:
        parameters = list(objective.parameters())
        assert objective.outer_weight_decay == case.weight_decay
        self.leaves = [tensor for modality in reference.network.weights for tensor in modality]
        self.ours = torch.optim.AdamW(parameters, lr=case.lr, weight_decay=objective.outer_weight_decay)
        self.theirs = torch.optim.AdamW(self.leaves, lr=case.lr, weight_decay=case.weight_decay)

    def step(self, expected: Step) -> None:
        """Step both; ours has its gradients from backward."""
        for leaf, gradient in zip(self.leaves, (g for modality in expected.network_gradients for g in modality)):
            leaf.grad = gradient
        for optimizer in (self.ours, self.theirs):
            optimizer.step()
        self.ours.zero_grad()


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_reference(name: str, features: FeatureMaker) -> None:
    case = CASES[name]
    objective = make_objective(case.flags(), RunShape(DIM, N, 1, STEPS_PER_EPOCH, EPOCHS)).double()
    assert isinstance(objective, NeuCLIP)
    reference = make_reference(case)
    simultaneous = case.optimizer is None
    outer = OuterOptimizer(case, objective, reference) if simultaneous else None
    for step in range(7):
        epoch = step // STEPS_PER_EPOCH
        if step % STEPS_PER_EPOCH == 0:
            objective.start_epoch(epoch)
        images, texts = features(step, N, DIM)
        # The temperature changes during training, too.
        logit_scale = torch.tensor(8.0 + step, dtype=torch.float64, requires_grad=True)
        expected = reference.step(images, texts, logit_scale, epoch)
        output = objective(images, texts, logit_scale)
        # A gradient scaler multiplies the loss: every gradient has to follow.
        (3.0 * output.loss).backward()

        torch.testing.assert_close(output.loss.detach(), expected.loss, **EXACT)
        for part, tensor, target in zip(("images", "texts", "1/τ"), (images, texts, logit_scale), expected.gradients):
            where = f"step {step}, {part}"
            torch.testing.assert_close(tensor.grad, 3.0 * target, msg=lambda m, w=where: f"{w}: {m}", **EXACT)
        assert_same_weights(objective.normalizer, reference, step)
        if isinstance(reference.network, Prototypes):
            assert isinstance(objective.normalizer, PrototypeNormalizer)
            assert objective.normalizer.active == reference.network.active
        if outer is None:
            assert_same_accumulators(objective.normalizer, reference)
            assert list(objective.parameters()) == []
        else:
            for k in range(2):
                for parameter, target in zip(objective.parameters(), expected.network_gradients[k]):
                    assert parameter.grad is not None
                    torch.testing.assert_close(parameter.grad[k], 3.0 * target, **EXACT)
            for parameter in objective.parameters():
                parameter.grad /= 3.0
            outer.step(expected)
            # Coordinates whose gradient is rounding only would be moved by Adam in either direction.
            assert_same_weights(objective.normalizer, reference, step)
        assert_same_metrics(output.metrics, expected, reference.gamma(epoch, step), case.eps, simultaneous)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_can_tell_right_from_wrong(name: str, features: FeatureMaker) -> None:
    """Guards the test above: gradients are not all rounding, and an inner loop that runs changes its objective."""
    case = CASES[name]
    reference = make_reference(case)
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    expected = reference.step(*features(0, N, DIM), scale, 0)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected.gradients)
    assert max(float(g.abs().max()) for modality in expected.network_gradients for g in modality) > 1e-4
    if case.updates:
        assert abs(float(expected.inner_losses[-1] - expected.inner_losses[0])) > 1e-4


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
