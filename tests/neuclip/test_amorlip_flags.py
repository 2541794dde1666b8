"""AmorLIP's flags: published names and spellings, defaults, lists over the epochs, schedules, and what is refused."""

from __future__ import annotations

import logging
import math
import shlex
from argparse import ArgumentParser, Namespace

import pytest
import torch

from neuclip import RunShape, make_objective
from neuclip.objectives import TemperatureLearning, add_arguments, resolve
from neuclip.objectives.amorlip import AmorLIP
from neuclip.objectives.amorlip_flags import AmorLIPSettings

from .conftest import FeatureMaker

SHAPE = RunShape(embed_dim=6, batch_size=4, world_size=2, steps_per_epoch=10, epochs=12)

# The published command of the method, flags of the training program left out.
PUBLISHED = (
    '--lambda-lr 0.001 --lambda-update-frequency "[3]" --learn-logit-scale --lambda_tolerance=5e-3 --calculate_full '
    "--h_dim_factor 1 --lr_tau 1e-4 --scale_loss --model_ema_beta 0.92 --beta_decay_epochs 16 --z_beta_max 0.8 "
    "--update_ema_mlps_every_n_steps 2 --pos_coef 1e-3 --fit_w_prev --lambda_eps 0. --reinit_lambda_every_n_epochs 1 "
    '--rho_list="[8.5 -8.5 -8.5]" --lambda_loss_type "log_l2"'
)


def resolved(line: str, epochs: int = SHAPE.epochs) -> Namespace:
    parser = ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(shlex.split(line))
    args.epochs = epochs
    resolve(args)
    return args


def amorlip(line: str, shape: RunShape = SHAPE) -> AmorLIP:
    objective = make_objective(f"--objective amorlip {line}", shape)
    assert isinstance(objective, AmorLIP)
    return objective


def test_defaults_are_the_published_run() -> None:
    published = amorlip(f"--amorlip {PUBLISHED}")
    objective = amorlip("--beta_decay_epochs 16")
    assert published.settings == objective.settings == AmorLIPSettings(epochs=12)
    for built in (published, objective):
        normalizer = built.normalizer
        assert (normalizer.loss, normalizer.regularisation, normalizer.average_decay) == ("log_l2", 0.1, 0.92)
        assert normalizer.optimizer.lr == 1e-3
        assert normalizer.current.shapes["linear_1.weight"] == (6, 6)
        assert built.temperature_learning is TemperatureLearning.OUTER


@pytest.mark.parametrize(("epochs", "expected"), [(1, 1.0), (2, 1.0), (5, 2.5), (32, 16.0)])
def test_beta_rises_over_half_of_the_run_unless_told(epochs: int, expected: float) -> None:
    assert resolved("--amorlip", epochs).beta_decay_epochs == expected
    assert resolved("--amorlip --beta_decay_epochs 3", epochs).beta_decay_epochs == 3.0


def test_everything_that_is_given_is_kept() -> None:
    objective = amorlip(
        "--lambda-lr 0.02 --lambda-update-frequency '[5 0]' --lambda_loss_type js_div --rho_list='[-1.5, 2]' --rho 6 "
        "--model_ema_beta 0.3 --beta_decay_epochs 2.5 --z_beta_max 0.4 --reinit_lambda_every_n_epochs -1 --pos_coef 0 "
        "--h_dim_factor 2.5 --no-fit_w_prev --no-scale_loss --no-calculate_full --lambda_eps 0.25 --div_reg_coef 0.7 "
        "--update_lambda_every_n_steps 4 --update_ema_mlps_every_n_steps 5 --lambda_fit_neg_only "
        "--temperature_scheme global_constant"
    )
    assert objective.settings == AmorLIPSettings(
        updates=(5, 0),
        update_every=4,
        average_every=5,
        restart_epochs=-1,
        fit_previous=False,
        previous_weight=0.4,
        previous_epochs=2.5,
        positive_weight=0.0,
        negatives_only=True,
        all_negatives=False,
        offset=0.25,
        scale_loss=False,
        adaptive_tau=False,
        rho_list=(-1.5, 2.0),
        rho=6.0,
        epochs=12,
    )
    normalizer = objective.normalizer
    assert (normalizer.loss, normalizer.regularisation, normalizer.average_decay) == ("js_div", 0.7, 0.3)
    assert normalizer.optimizer.lr == 0.02
    assert normalizer.current.shapes["linear_1.weight"] == (15, 6)
    assert objective.temperature_learning is TemperatureLearning.CONSTANT
    assert amorlip("--adaptive_tau").settings.adaptive_tau


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("--rho_list '[8.5 -8.5 -8.5]'", (8.5, -8.5, -8.5)),
        ("--rho_list='[8.5 -8.5]'", (8.5, -8.5)),
        ("--rho_list='[-8.5, 1e1]'", (-8.5, 10.0)),
        ("--rho_list '  [ 3 ] '", (3.0,)),
        ("--rho_list 6.5", (6.5,)),
        ("--rho_list=-6.5", (-6.5,)),
        ("--rho_list -6.5", (-6.5,)),
    ],
)
def test_spellings_of_a_list(written: str, values: tuple[float, ...]) -> None:
    assert amorlip(written).settings.rho_list == values


@pytest.mark.parametrize(("written", "values"), [("3", (3,)), ("'[3]'", (3,)), ("'[500 100]'", (500, 100))])
def test_spellings_of_the_update_frequency(written: str, values: tuple[int, ...]) -> None:
    assert amorlip(f"--lambda-update-frequency {written}").settings.updates == values


@pytest.mark.parametrize(
    ("epochs", "rho"),
    [
        (3, [1, 2, 3]),
        (6, [1, 1, 2, 2, 3, 3]),
        # equal parts of epochs // 3, and the rest for the last
        (8, [1, 1, 2, 2, 3, 3, 3, 3]),
        # fewer epochs than numbers: in their order, instead of the last one only
        (2, [1, 2]),
        (1, [1]),
    ],
)
def test_a_list_is_spread_over_the_epochs(epochs: int, rho: list[float]) -> None:
    objective = amorlip("--rho_list '[1 2 3]'", RunShape(6, 8, 1, 1, epochs))
    found = []
    for epoch in range(epochs):
        objective.start_epoch(epoch)
        found.append(objective.rho)
    assert found == rho


def test_the_update_frequency_follows_the_epochs(features: FeatureMaker) -> None:
    objective = amorlip("--lambda-update-frequency '[2 0 5]' --reinit_lambda_every_n_epochs 0", RunShape(6, 8, 1, 1, 3))
    counts = []
    for epoch in range(3):
        objective.start_epoch(epoch)
        objective(*(x.float() for x in features(epoch, 8)), torch.tensor(5.0))
        counts.append(objective.normalizer.optimizer.updates)
    assert counts == [2, 2, 7]


def test_the_weight_of_the_past_rises_along_a_half_cosine() -> None:
    objective = amorlip("--z_beta_max 0.8 --beta_decay_epochs 4")
    found = []
    for epoch in range(6):
        objective.start_epoch(epoch)
        found.append(objective.previous_weight)
    quarter = 0.8 * 0.5 * (1 - math.sqrt(0.5))
    assert found == pytest.approx([0.0, quarter, 0.4, 0.8 - quarter, 0.8, 0.8])
    without = amorlip("--z_beta_max 0.8 --beta_decay_epochs 4 --no-fit_w_prev")
    without.start_epoch(3)
    assert without.previous_weight == 0.0


@pytest.mark.parametrize(("every", "restarts"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (0, []), (-1, [])])
def test_the_networks_begin_anew_when_told(every: int, restarts: list[int]) -> None:
    objective = amorlip(f"--reinit_lambda_every_n_epochs {every}")
    found = []
    for epoch in range(5):
        before = objective.normalizer.current.weights.clone()
        objective.start_epoch(epoch)
        if not torch.equal(before, objective.normalizer.current.weights):
            found.append(epoch)
    assert found == restarts


def test_the_two_rhos_are_two_things(features: FeatureMaker) -> None:
    """--rho_list belongs to the loss, --rho to the reported global_loss, which every objective has."""
    images, texts = (x.detach().float() for x in features(0, 8))
    tau = 0.1

    def run(flags: str) -> tuple[float, float]:
        output = amorlip(flags)(images, texts, torch.tensor(1 / tau))
        return float(output.loss), float(output.metrics["global_loss"])

    loss, report = run("--rho_list 0 --rho 0")
    assert run("--rho_list 5 --rho 0") == pytest.approx((loss + 5 * tau, report), rel=1e-5)
    assert run("--rho_list 0 --rho 5") == pytest.approx((loss, report + 5 * tau), rel=1e-5)
    assert run("--rho_list 5 --rho 0 --no-scale_loss")[0] == pytest.approx(
        run("--rho_list 0 --rho 0 --no-scale_loss")[0]
    )


def test_the_seed_of_a_run_reaches_the_networks() -> None:
    weights = []
    for seed in (None, 0, 7, 7):
        args = resolved("--amorlip")
        if seed is not None:
            args.seed = seed
        objective = AmorLIP.from_args(args, SHAPE)
        objective.start_epoch(1)
        weights.append(objective.normalizer.current.weights)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("lambda-lr", value) for value in ("0", "-1", "nan", "inf")),
        *(("lambda-update-frequency", value) for value in ("-1", "[3 -1]", "2.5", "[]", "many", "[3 [4]]", "nan")),
        *(("rho_list", value) for value in ("[]", "", "[8.5 x]", "nan", "[8.5 inf]", "high")),
        *(("model_ema_beta", value) for value in ("-0.1", "1.5", "nan")),
        *(("beta_decay_epochs", value) for value in ("0", "-1", "nan", "inf")),
        *(("z_beta_max", value) for value in ("-0.1", "1.5", "nan")),
        *(("pos_coef", value) for value in ("-0.1", "nan", "inf")),
        *(("h_dim_factor", value) for value in ("0", "-1", "nan", "inf")),
        *(("lambda_tolerance", value) for value in ("-1", "nan")),
        *(("lambda_eps", value) for value in ("nan", "inf")),
        *(("update_lambda_every_n_steps", value) for value in ("0", "-1")),
        *(("update_ema_mlps_every_n_steps", value) for value in ("0", "-1")),
        *(("div_reg_coef", value) for value in ("-0.1", "nan")),
        *(("rho", value) for value in ("-1", "nan")),
        ("temperature_scheme", "individual_learnable"),
    ],
)
def test_a_bad_value_is_named_with_its_flag_before_anything_is_built(flag: str, value: str) -> None:
    with pytest.raises(ValueError, match="--") as caught:
        resolved(f"--amorlip --{flag}={shlex.quote(value)}")
    message = str(caught.value)
    assert "\n" not in message
    assert f"--{flag} " in message
    shown = {value, value + ".0"}
    assert any(text in message for text in shown)
    assert message.partition(f"--{flag}")[2].partition(": ")[2]  # the remedy follows


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            "--learn-logit-scale --temperature_scheme global_constant",
            ("--learn-logit-scale", "--temperature_scheme global_constant", "drop"),
        ),
        ("--adaptive_tau --no-scale_loss", ("--adaptive_tau", "--no-scale_loss", "drop")),
        ("--siglip", ("--objective amorlip", "--siglip", "drop")),
    ],
)
def test_contradictions_name_the_flags_and_the_remedy(line: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="--") as caught:
        resolved(f"--objective amorlip {line}")
    for part in parts:
        assert part in str(caught.value)


def test_what_depends_on_the_shape_is_checked_when_built() -> None:
    with pytest.raises(ValueError, match=r"--h_dim_factor 0\.1 .* width 6: "):
        amorlip("--h_dim_factor 0.1")
    one_each = RunShape(6, 1, 8, 10, 12)
    with pytest.raises(ValueError, match=r"--no-calculate_full .* 1: .*--batch-size"):
        amorlip("--no-calculate_full", one_each)
    assert amorlip("", one_each).settings.all_negatives


def test_one_sample_of_its_own_is_refused_in_other_loops_too(features: FeatureMaker) -> None:
    objective = amorlip("--no-calculate_full")
    images, texts = features(0, 1)
    with pytest.raises(ValueError, match="at least 2 samples"):
        objective(images, texts, torch.tensor(5.0))


@pytest.mark.parametrize(("flags", "warned"), [("", False), ("--lambda_tolerance 5e-3", True)])
def test_a_tolerance_is_said_to_have_no_effect(flags: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    amorlip(flags)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == warned
    assert all("--lambda_tolerance has no effect" in message for message in warnings)


def test_unknown_choices_end_the_program() -> None:
    with pytest.raises(SystemExit):
        amorlip("--lambda_loss_type l2")
