"""The AmorLIP objective against an independent implementation of its formulas, step by step; and the formulas' own claims."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from neuclip import RunShape, make_objective
from neuclip.normalizers import DIVERGENCES, Adam, ResidualMLPs, fit_loss
from neuclip.objectives.amorlip import AmorLIP

from .conftest import FeatureMaker
from .reference_amorlip import Network, Options, ReferenceAmorLIP, divergence

N, DIM, STEPS_PER_EPOCH, EPOCHS = 6, 5, 3, 3
EXACT = {"rtol": 1e-10, "atol": 1e-11}

CASES = {
    **{loss: Options(loss=loss) for loss in DIVERGENCES},
    **{f"{loss}, average": Options(loss=loss, fit_w_prev=False, reinit_every=0) for loss in DIVERGENCES},
    **{f"{loss}, negatives": Options(loss=loss, neg_only=True, pos_coef=0.5) for loss in DIVERGENCES},
    "average, negatives": Options(fit_w_prev=False, neg_only=True, pos_coef=0.5, eps=0.3),
    "average, fresh start": Options(fit_w_prev=False, ema_every=1, model_ema_beta=0.5),
    "js_div, no regularisation": Options(loss="js_div", div_reg_coef=0.0, pos_coef=1.0),
    "kl_div_sym, much regularisation": Options(loss="kl_div_sym", div_reg_coef=2.0),
    "no pair": Options(pos_coef=0.0),
    "no pair, kl_div_asym": Options(pos_coef=0.0, loss="kl_div_asym", neg_only=True),
    "unscaled": Options(scale_loss=False, pos_coef=0.3),
    "adaptive": Options(adaptive_tau=True),
    "adaptive, average": Options(adaptive_tau=True, fit_w_prev=False, eps=-0.2),
    "lists": Options(updates=[4, 0, 2], rho_list=[3.0, -1.0]),
    "sparse": Options(update_every=2, ema_every=3, lr=0.01, eps=0.5),
    "never again": Options(reinit_every=0, model_ema_beta=0.3),
    "every other epoch": Options(reinit_every=2, model_ema_beta=0.3, ema_every=1),
    "all of the past": Options(z_beta_max=1.0, beta_decay_epochs=1.0, loss="kl_div_asym"),
    "narrow": Options(h_dim_factor=0.5),
    "wide": Options(h_dim_factor=2.5, loss="kl_div_sym"),
}


def flags_of(options: Options) -> str:
    def list_of(values: list[Any]) -> str:
        return f"'[{' '.join(str(value) for value in values)}]'"

    def switch(name: str, on: bool) -> str:
        return f"--{name}" if on else f"--no-{name}"

    return " ".join(
        (
            f"--objective amorlip --lambda_loss_type {options.loss} --lambda-lr {options.lr}",
            f"--lambda-update-frequency {list_of(options.updates)} --rho_list={list_of(options.rho_list)} --rho 6.5",
            f"--model_ema_beta {options.model_ema_beta} --beta_decay_epochs {options.beta_decay_epochs}",
            f"--z_beta_max {options.z_beta_max} --reinit_lambda_every_n_epochs {options.reinit_every}",
            f"--pos_coef {options.pos_coef} --h_dim_factor {options.h_dim_factor} --lambda_eps {options.eps}",
            f"--update_lambda_every_n_steps {options.update_every} --div_reg_coef {options.div_reg_coef}",
            f"--update_ema_mlps_every_n_steps {options.ema_every}",
            switch("fit_w_prev", options.fit_w_prev),
            switch("scale_loss", options.scale_loss),
            "--adaptive_tau" if options.adaptive_tau else "",
            "--lambda_fit_neg_only" if options.neg_only else "",
        )
    )


def copy_weights(source: ResidualMLPs, networks: list[Network]) -> None:
    for name, values in source.named_parts(source.weights).items():
        for modality, network in enumerate(networks):
            parameter = network.get_parameter(name)
            with torch.no_grad():
                parameter.copy_(values[modality].view_as(parameter))


def assert_same_weights(source: ResidualMLPs, vector: Tensor, networks: list[Network], read: Any, where: str) -> None:
    """Compare a vector laid out as the weights with what `read` finds for each parameter of the reference."""
    for name, values in source.named_parts(vector).items():
        for modality, network in enumerate(networks):
            expected = read(network.get_parameter(name)).detach()
            torch.testing.assert_close(
                values[modality],
                expected.view_as(values[modality]),
                msg=lambda m, n=name: f"{where}, {n}: {m}",
                **EXACT,
            )


def assert_same_networks(objective: AmorLIP, reference: ReferenceAmorLIP, where: str) -> None:
    normalizer = objective.normalizer
    current, adam = normalizer.current, reference.adam
    pairs = (
        ("current", normalizer.current, reference.networks),
        ("average", normalizer.average, reference.averages),
        ("previous", normalizer.previous, reference.previous),
    )
    for name, network, expected in pairs:
        assert_same_weights(network, network.weights, expected, lambda p: p, f"{where}, {name}")
    for moment, key in (
        (normalizer.optimizer.first_moment, "exp_avg"),
        (normalizer.optimizer.second_moment, "exp_avg_sq"),
    ):
        read = lambda p, k=key: adam.state[p][k] if p in adam.state else torch.zeros_like(p)  # noqa: E731
        assert_same_weights(current, moment, reference.networks, read, f"{where}, {key}")


def start_epoch(objective: AmorLIP, reference: ReferenceAmorLIP, epoch: int) -> None:
    """Fresh weights come from the objective; when there have to be some, and what else happens, is the reference's word."""
    before = objective.normalizer.current.weights.clone()
    objective.start_epoch(epoch)
    if epoch == 0:
        copy_weights(objective.normalizer.current, reference.networks)
        reference.begin()
        reference.keep_averages()
        return
    reference.keep_averages()
    every = reference.options.reinit_every
    restarted = every > 0 and epoch % every == 0
    assert torch.equal(objective.normalizer.current.weights, before) != restarted
    if restarted:
        copy_weights(objective.normalizer.current, reference.networks)
        reference.begin()


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_reference(case: str, biased: bool, features: FeatureMaker) -> None:
    options = CASES[case]
    objective = make_objective(flags_of(options), RunShape(DIM, N, 1, STEPS_PER_EPOCH, EPOCHS)).double()
    assert isinstance(objective, AmorLIP)
    reference = ReferenceAmorLIP(DIM, options)
    for step in range(8):
        epoch = step // STEPS_PER_EPOCH
        if step % STEPS_PER_EPOCH == 0:
            start_epoch(objective, reference, epoch)
        images, texts = features(step, N, DIM)
        # The temperature changes during training, too.
        scale = torch.tensor(3.0 + 0.3 * step, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(0.1 * step - 0.5, dtype=torch.float64, requires_grad=True) if biased else None
        expected = reference.step(images, texts, scale, bias, epoch)
        output = objective(images, texts, scale, bias)
        inputs = [x for x in (images, texts, scale, bias) if x is not None]
        gradients = torch.autograd.grad(output.loss, inputs)

        torch.testing.assert_close(output.loss.detach(), expected.loss, **EXACT)
        for name, value, target in zip(("images", "texts", "scale", "bias"), gradients, expected.gradients):
            # With λ̂ = log Z of the batch itself no bias changes anything.
            assert target.abs().max() > 1e-6 or name == "bias"
            torch.testing.assert_close(value, target, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}", **EXACT)
        assert_same_networks(objective, reference, f"step {step}")

        found = {name: float(value) for name, value in output.metrics.items()}
        assert found["inner_loss_before"] == pytest.approx(float(expected.inner_before), rel=1e-9)
        assert found["inner_loss_after"] == pytest.approx(float(expected.inner_after), rel=1e-9)
        assert found["z_beta"] == pytest.approx(expected.z_beta, abs=1e-12)
        assert found["rho"] == expected.rho
        # α = log of the normalizer relative to the matching pair and per negative, as the other methods mean it.
        logits = scale.detach() * (images * texts).sum(dim=1).detach() + (0.0 if bias is None else bias.detach())
        alpha = (expected.log_normalizers - logits).mean() - math.log(N - 1)
        assert found["log_normalizer"] == pytest.approx(float(alpha), rel=1e-9, abs=1e-10)
        assert found["global_loss"] == pytest.approx(float((alpha + 6.5) / scale.detach()), rel=1e-9)


def test_the_cases_reach_every_option() -> None:
    """Guards the comparison above: each option is at two values or more."""
    for name in (field.name for field in dataclasses.fields(Options)):
        if name not in ("epochs", "ranks"):
            assert len({str(getattr(options, name)) for options in CASES.values()}) > 1, name


KINDS = [kind for kind in DIVERGENCES if kind != "log_l2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_mass", [0.0, -1.3, 0.7])
@pytest.mark.parametrize("difference", [-6.0, -1.0, -1e-3, 0.0, 1e-3, 0.5, 2.0, 30.0])
def test_divergences_need_no_pairs(kind: str, log_mass: float, difference: float) -> None:
    """A function of the difference and the mass equals the sum over all pairs, in value and derivative."""
    terms = list(torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5 + 0.1)
    log_sum = torch.log(sum(terms))
    target = log_sum - log_mass
    prediction = (target + difference).requires_grad_()
    expected = divergence(kind, terms, prediction, target)
    (expected_slope,) = torch.autograd.grad(expected, prediction)
    value, slope = fit_loss(kind, prediction.detach(), target, log_sum, 0.0)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-11, atol=1e-13)
    regularised, steeper = fit_loss(kind, prediction.detach(), target, log_sum, 0.1)
    torch.testing.assert_close(regularised, value + 0.1 * difference**2, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(steeper, slope + 0.2 * difference, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_target_is_the_only_minimum(kind: str) -> None:
    """In the release the asymmetric divergence has no mass terms, and its smallest value elsewhere."""
    difference = torch.linspace(-8, 8, 161, dtype=torch.float64)
    zeros = torch.zeros_like(difference)
    value, slope = fit_loss(kind, difference, zeros, zeros + 0.4, 0.0)
    assert float(value[80]) == pytest.approx(0.0, abs=1e-14)
    assert float(slope[80]) == pytest.approx(0.0, abs=1e-14)
    assert (value[:80] > 0).all()
    assert (value[81:] > 0).all()
    assert (slope[:80] < 0).all()
    assert (slope[81:] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("log_mass", [-200.0, 0.0, 200.0])
def test_divergences_stay_finite_and_draw_towards_the_target(kind: str, log_mass: float, dtype: torch.dtype) -> None:
    difference = torch.tensor([-1e3, -300.0, -41.0, -39.0, 39.0, 41.0, 300.0, 1e3], dtype=dtype)
    value, slope = fit_loss(kind, difference, torch.zeros(8, dtype=dtype), torch.full((8,), log_mass, dtype=dtype), 0.1)
    assert torch.isfinite(value).all()
    assert torch.isfinite(slope).all()
    assert (value > 0).all()
    assert (slope[:4] < 0).all()
    assert (slope[4:] > 0).all()


def test_adam_equals_the_one_of_pytorch_after_a_reset_too() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(7, generator=generator, dtype=torch.float64)
    ours = Adam((7,), lr=0.03).double()
    mine = weights.clone()
    for _ in range(2):
        theirs = mine.clone().requires_grad_()
        adam = torch.optim.Adam([theirs], lr=0.03)
        ours.reset()
        for _ in range(5):
            gradient = torch.randn(7, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-6.0, 1.0)
            theirs.grad = gradient.clone()
            adam.step()
            ours.update_(mine, gradient)
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-13, atol=1e-14)
    assert not torch.equal(mine, weights)


def test_adam_survives_a_gradient_whose_square_is_no_float32() -> None:
    weights = torch.zeros(3)
    adam = Adam((3,), lr=0.1)
    adam.update_(weights, torch.tensor([1e30, -1e30, 1.0]))
    assert torch.isfinite(adam.second_moment).all()
    torch.testing.assert_close(weights, torch.tensor([-0.1, 0.1, -0.1]))


def test_the_networks_equal_layers_of_pytorch(features: FeatureMaker) -> None:
    networks = ResidualMLPs(5, 7, seed=3).double()
    expected = [Network(5, 7) for _ in range(2)]
    networks.weights.copy_(torch.randn(networks.weights.shape, generator=torch.Generator().manual_seed(2)))
    copy_weights(networks, expected)
    anchors = torch.stack(features(0, 4, 5)).detach()
    with torch.no_grad():
        values = torch.stack([torch.stack([net(x) for x in rows]) for net, rows in zip(expected, anchors)])
    torch.testing.assert_close(networks(anchors), values, rtol=1e-12, atol=1e-13)


def test_fresh_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    state = torch.random.get_rng_state()
    first, again, other = ResidualMLPs(64, 32, seed=1), ResidualMLPs(64, 32, seed=0).double(), ResidualMLPs(64, 32, 2)
    again.reinitialise(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.weights.double(), again.weights)
    assert not torch.equal(first.weights, other.weights)

    parts = first.named_parts(first.weights)
    for name, inputs in (("linear_1", 64), ("linear_2", 32), ("linear_3", 64)):
        bound = inputs**-0.5
        values = parts[f"{name}.weight"]
        assert 0.9 * bound < float(values.abs().max()) <= bound
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert not torch.equal(values[0], values[1])
    for name in ("norm_1", "norm_2"):
        assert (parts[f"{name}.weight"] == 1).all()
        assert (parts[f"{name}.bias"] == 0).all()


def test_seeds_of_runs_and_epochs_give_different_weights() -> None:
    seen = []
    for seed in (0, 1):
        objective = make_objective("--objective amorlip", RunShape(DIM, N, 1, 2, 4))
        assert isinstance(objective, AmorLIP)
        objective.normalizer.seed = seed
        for epoch in (1, 2, 3):
            objective.start_epoch(epoch)
            seen.append(objective.normalizer.current.weights.clone())
    assert len({tuple(weights.flatten().tolist()) for weights in seen}) == 6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_networks_learn_the_normalizers(kind: str, features: FeatureMaker) -> None:
    """On one batch, over and over: the prediction comes to the target."""
    objective = make_objective(
        f"--objective amorlip --lambda_loss_type {kind} --lambda-update-frequency 50 --lambda-lr 0.01 --no-fit_w_prev",
        RunShape(16, N, 1, 10, 1),
    )
    images, texts = features(0, N, 16, dtype=torch.float32)
    found = [objective(images, texts, torch.tensor(5.0)).metrics for _ in range(12)]
    assert float(found[0]["inner_loss_after"]) < 0.7 * float(found[0]["inner_loss_before"])
    assert float(found[-1]["inner_loss_after"]) < 0.01 * float(found[0]["inner_loss_before"])


def test_the_networks_are_not_for_the_outer_optimizer() -> None:
    objective = make_objective("--objective amorlip", RunShape(DIM, N, 1, 2, 4))
    assert [p for p in objective.parameters() if p.requires_grad] == []
    assert isinstance(objective, AmorLIP)
    assert objective.normalizer.current.weights.numel() > 50
