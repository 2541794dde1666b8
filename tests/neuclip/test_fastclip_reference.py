"""FastCLIP against an independent implementation, step by step, with samples that come back in every epoch."""

from __future__ import annotations

import math

import pytest
import torch

from neuclip import RunShape, make_objective
from neuclip.objectives import TemperatureLearning
from neuclip.objectives.fastclip import FastCLIP, IndividualFastCLIP

from .conftest import FeatureMaker
from .reference_fastclip import ReferenceFastCLIP

N, DIM, STEPS_PER_EPOCH, EPOCHS, DATA_SIZE = 6, 5, 2, 4, 40
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SCHEMES = {
    "v0": "--temperature_scheme global_learnable",
    "v1": "--temperature_scheme global_constant",
    "v2": "--temperature_scheme individual_learnable --temperature 0.1 --lr_tau 0.02",
    "v3": "--temperature_scheme global_learnable --multiply_tau",
}


def cosine(gamma: float, epoch: int, length: float) -> float:
    return gamma if epoch >= length else 0.5 * (1 + math.cos(math.pi * epoch / length)) * (1 - gamma) + gamma


def keys_of(step: int) -> list[int]:
    """Every epoch visits the same samples, mixed differently, and a few that are new."""
    order = torch.randperm(2 * N, generator=torch.Generator().manual_seed(step // STEPS_PER_EPOCH)).tolist()
    keys = [3 * position for position in order[step % STEPS_PER_EPOCH * N :][:N]]
    keys[0] = DATA_SIZE - 1 - step if step % 2 else keys[0]
    return keys


@pytest.mark.parametrize(
    ("schedule", "gamma", "eps"), [("constant", 0.3, 1e-14), ("cosine", 0.2, 0.0), ("constant", 0.9, 0.1)]
)
@pytest.mark.parametrize("version", SCHEMES)
def test_steps_equal_the_reference(
    version: str, schedule: str, gamma: float, eps: float, features: FeatureMaker
) -> None:
    objective = make_objective(
        f"--fastclip {SCHEMES[version]} --gamma {gamma} --gamma_schedule {schedule} --gamma_decay_epochs 2 --rho 1.5 "
        f"--fastclip_eps {eps} --data_size {DATA_SIZE}",
        RunShape(DIM, N, 1, STEPS_PER_EPOCH, EPOCHS),
    ).double()
    assert isinstance(objective, FastCLIP)
    # The table is float32 until .double() comes, and so is a first temperature of 0.1.
    first_tau = float(torch.tensor(0.1)) if version == "v2" else 0.07
    reference = ReferenceFastCLIP(version, eps, 1.5, first_tau, objective.temperature_lr)
    for step in range(STEPS_PER_EPOCH * EPOCHS):
        epoch = step // STEPS_PER_EPOCH
        if step % STEPS_PER_EPOCH == 0:
            objective.start_epoch(epoch)
        images, texts = features(step, N, DIM)
        scale = torch.tensor(8.0 + step, dtype=torch.float64, requires_grad=True)
        in_force = gamma if schedule == "constant" else cosine(gamma, epoch, 2.0)
        expected = reference.step(images, texts, scale, keys_of(step), in_force, epoch)
        output = objective(images, texts, scale, None, torch.tensor(keys_of(step)))
        gradients = torch.autograd.grad(output.loss, (images, texts, scale))

        torch.testing.assert_close(output.loss.detach(), expected.loss, **EXACT)
        for name, value, target in zip(("images", "texts", "logit_scale"), gradients, expected.gradients):
            torch.testing.assert_close(value, target, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}", **EXACT)
        assert_same_table(objective.table.local_rows(), reference)
        metrics = {name: float(value) for name, value in output.metrics.items()}
        assert metrics["gamma"] == pytest.approx(in_force)
        assert metrics["log_normalizer"] == pytest.approx(float(expected.log_u.mean()), rel=1e-10)
        gap = (expected.log_u - expected.estimate).abs()
        assert metrics["log_normalizer_gap"] == pytest.approx(float(gap.mean()), rel=1e-8, abs=1e-12)
        assert metrics["log_normalizer_gap_max"] == pytest.approx(float(gap.max()), rel=1e-8, abs=1e-12)


def assert_same_table(table: torch.Tensor, reference: ReferenceFastCLIP) -> None:
    assert len(table) == DATA_SIZE
    for key, row in enumerate(table.tolist()):
        if key not in reference.samples:
            assert row[:2] == [-math.inf, -math.inf]
            continue
        sample = reference.samples[key]
        expected = [math.log(u) for u in sample.u]
        if len(row) > 2:
            expected += [*sample.tau, *sample.first_moment, *sample.second_moment]
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-11), key


def test_temperatures_of_samples_go_their_own_ways_within_bounds(features: FeatureMaker) -> None:
    """A large rate reaches both bounds; the model's own temperature is left alone."""
    objective = make_objective(
        f"--fastclip {SCHEMES['v2']} --data_size {N} --rho 3", RunShape(DIM, N, 1, STEPS_PER_EPOCH, EPOCHS)
    )
    assert isinstance(objective, IndividualFastCLIP)
    assert objective.temperature_learning is TemperatureLearning.OBJECTIVE
    objective.temperature_lr = 0.4
    for step in range(8):
        objective.start_epoch(step // 4)
        images, texts = features(step, N, DIM, dtype=torch.float32)
        objective(images, texts, torch.tensor(10.0), None, torch.arange(N))
    temperatures = objective.table.local_rows()[:, 2:4]
    assert temperatures.min() >= 0.01
    assert temperatures.max() <= 1.0
    assert len(temperatures.unique()) > 2


def test_a_broken_batch_does_not_spoil_its_samples(features: FeatureMaker) -> None:
    """What is no number is not remembered, for any version."""
    for scheme in SCHEMES.values():
        objective = make_objective(
            f"--fastclip {scheme} --gamma 0.5 --gamma_schedule constant --data_size {N}", RunShape(DIM, N, 1, 2, 2)
        )
        assert isinstance(objective, FastCLIP)
        keys = torch.arange(N)
        for step in range(4):
            images, texts = (x.detach().clone() for x in features(step, N, DIM, dtype=torch.float32))
            if step in (0, 2):
                images[1] = torch.nan
            loss = objective(images, texts, torch.tensor(10.0), None, keys).loss
            assert bool(torch.isfinite(loss)) == (step in (1, 3))
        assert torch.isfinite(objective.table.local_rows()).all()


@pytest.mark.parametrize("version", SCHEMES)
def test_keys_outside_the_table_are_named(version: str) -> None:
    objective = make_objective(f"--fastclip {SCHEMES[version]} --data_size 100", RunShape(DIM, N, 1, 2, 2))
    objective.check_keys(torch.tensor([0, 99]))
    with pytest.raises(ValueError, match=r"key 100, outside 0 … 99 of --data_size 100.*at least 101"):
        objective.check_keys(torch.tensor([5, 100, 3]))
    with pytest.raises(ValueError, match=r"key -1, outside"):
        objective.check_keys(torch.tensor([-1]))


def test_keys_are_needed(features: FeatureMaker) -> None:
    objective = make_objective("--fastclip --data_size 100", RunShape(DIM, N, 1, 2, 2)).double()
    with pytest.raises(ValueError, match="integer keys"):
        objective(*features(0, N, DIM), torch.tensor(10.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--fastclip", ("--data_size", "largest key")),
        ("--fastclip --data_size 0", ("--data_size 0", "largest key")),
        ("--fastclip --data_size 9 --gamma 1.5", ("--gamma 1.5", "weight")),
        ("--fastclip --data_size 9 --rho -1", ("--rho -1.0", "give")),
        ("--fastclip --data_size 9 --table-gpu-gib -1", ("--table_gpu_gib -1.0", "GiB")),
    ],
)
def test_mistakes_name_the_flag_and_the_remedy(line: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="--") as caught:
        make_objective(line, RunShape(DIM, N, 1, 2, 2))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "learning", "multiply_tau", "columns"),
    [
        ("", TemperatureLearning.OUTER, False, 2),
        ("--temperature_scheme global_constant", TemperatureLearning.CONSTANT, False, 2),
        ("--temperature_scheme individual_learnable", TemperatureLearning.OBJECTIVE, True, 8),
        ("--multiply_tau", TemperatureLearning.OUTER, True, 2),
    ],
)
def test_published_flags_choose_the_version(
    scheme: str, learning: TemperatureLearning, multiply_tau: bool, columns: int
) -> None:
    objective = make_objective(f"--fastclip {scheme} --data_size 9", RunShape(DIM, N, 1, 2, epochs=30))
    assert isinstance(objective, FastCLIP)
    assert objective.temperature_learning is learning
    assert objective.multiply_tau == multiply_tau
    assert objective.table.local_rows().shape == (9, columns)
    assert (objective.gamma.gamma, objective.gamma.kind, objective.gamma.decay_epochs) == (0.2, "cosine", 15.0)
    assert (objective.rho, objective.log_eps) == (8.0, math.log(1e-14))
