"""Low temperatures, adversarial similarities, low precision: everything stays finite, and losses are float32 ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip import OBJECTIVES, Objective, RunShape, make_objective
from neuclip.normalizers import MLPNormalizer, PrototypeNormalizer
from neuclip.objectives.amorlip import AmorLIP
from neuclip.objectives.neuclip import NeuCLIP

from .conftest import FeatureMaker

DIM = 16
COLDEST = 100.0  # logit_scale at τ = 0.01, where the field clamps it
CHUNKS = ("", "--loss-chunk-size 3")


def direction(dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(0)), dim=0).to(dtype)


def adversarial(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features whose similarities are all +1 or −1."""
    v = direction(dtype)
    signs = torch.tensor([1.0, -1.0], dtype=dtype)[:, None]
    many = signs.repeat(4, 1)
    images, texts = {
        "two samples, s_ii = -1, s_ij = +1": (signs * v, -signs * v),
        "two samples, s_ii = +1, s_ij = -1": (signs * v, signs * v),
        "eight samples, s_ii = -1, s_ij = +1 or -1": (many * v, -many * v),
        "eight samples, s_ii = +1, s_ij = +1 or -1": (many * v, many * v),
        "eight samples, all s = +1": (v.repeat(8, 1), v.repeat(8, 1)),
        "eight samples, all s = -1": (v.repeat(8, 1), -v.repeat(8, 1)),
    }[case]
    return images.clone().requires_grad_(), texts.clone().requires_grad_()


CASES = (
    "two samples, s_ii = -1, s_ij = +1",
    "two samples, s_ii = +1, s_ij = -1",
    "eight samples, s_ii = -1, s_ij = +1 or -1",
    "eight samples, s_ii = +1, s_ij = +1 or -1",
    "eight samples, all s = +1",
    "eight samples, all s = -1",
)


def assert_finite_step(objective: Objective, images: Tensor, texts: Tensor) -> None:
    scale = torch.tensor(COLDEST, requires_grad=True)
    bias = None if objective.initial_logit_bias is None else torch.tensor(objective.initial_logit_bias)
    images.grad = texts.grad = None
    output = objective(images, texts, scale, bias, torch.arange(images.shape[0]))
    output.loss.backward()
    found = {"loss": output.loss, "images": images.grad, "texts": texts.grad, "scale": scale.grad, **output.metrics}
    found |= {name: value for name, value in objective.state_dict().items() if isinstance(value, Tensor)}
    assert not [name for name, value in found.items() if value is None or is_broken(name, value)]


def is_broken(name: str, value: Tensor) -> bool:
    """Whether a tensor has a number that is not finite; −∞ is the logarithm of what was never seen in a table."""
    never_seen = (value == -torch.inf) if name.endswith("table") else torch.zeros_like(value, dtype=torch.bool)
    return not (torch.isfinite(value) | never_seen).all()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_objective_is_finite_at_the_lowest_temperature(
    name: str, dtype: torch.dtype, case: str, chunk: str
) -> None:
    images, texts = adversarial(case, dtype)
    shape = RunShape(DIM, images.shape[0], 1, 10, 2)
    objective = make_objective(f"--objective {name} --data_size 8 {chunk}", shape)
    for _ in range(3):
        assert_finite_step(objective, images, texts)


# How an NPN may learn; those that learn on their own get the number of updates.
TRAININGS = {
    "adagrad_norm": "--npn_optimizer adagrad_norm --npn_repetition {updates}",
    "adagrad": "--npn_optimizer adagrad --npn_repetition {updates}",
    "simultaneous": "--npn_optimization simultaneous",
}


def neuclip_at(flags: str, training: str, updates: int) -> NeuCLIP:
    """An objective after its first restart."""
    flags = f"--objective neuclip --npn_restart_iter 0 --gamma 0 {TRAININGS[training].format(updates=updates)} {flags}"
    objective = make_objective(flags, RunShape(DIM, 8, 1, 10, 2))
    assert isinstance(objective, NeuCLIP)
    objective.step = 1
    return objective


def assert_finite_training(objective: NeuCLIP, images: Tensor, texts: Tensor) -> None:
    """Some steps, AdamW on what the objective leaves to it included."""
    own = list(objective.parameters())
    outer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1) if own else None
    for _ in range(3):
        assert_finite_step(objective, images, texts)
        if outer is not None:
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in own)
            outer.step()
            outer.zero_grad()


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("inner", ["unified", "separate"])
@pytest.mark.parametrize("eps", ["0", "1e-14", "1e-6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_neuclip_is_finite_with_the_worst_prototypes(
    training: str, inner: str, eps: str, dtype: torch.dtype, sign: float
) -> None:
    """Every prototype along one direction, or against it: predictions are off by up to 200 in the log."""
    for case in CASES:
        images, texts = adversarial(case, dtype)
        for updates in (0, 10):
            flags = f"--npn_num_protos 8 --npn_objective {inner} --fastclip_eps {eps}"
            objective = neuclip_at(flags, training, updates)
            assert isinstance(objective.normalizer, PrototypeNormalizer)
            objective.normalizer.active = 8
            worst = (sign * direction(torch.float32)).expand(2, 8, DIM)
            objective.normalizer.prototypes.detach().copy_(worst)
            assert_finite_training(objective, images, texts)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("inner", ["unified", "separate"])
@pytest.mark.parametrize("eps", ["0", "1e-6"])
@pytest.mark.parametrize("factor", [300.0, -300.0, 0.0])
def test_neuclip_is_finite_with_the_worst_mlp(training: str, inner: str, eps: str, factor: float) -> None:
    """All weights far too large: predictions are off by thousands in the log. All zero: LayerNorm has no variance."""
    for case in CASES:
        images, texts = adversarial(case, torch.float32)
        flags = f"--npn_arch mlp --npn_objective {inner} --fastclip_eps {eps}"
        objective = neuclip_at(flags, training, updates=5)
        assert isinstance(objective.normalizer, MLPNormalizer)
        for weight in objective.normalizer.mlp.state_dict().values():
            weight.mul_(factor)
        outputs = objective.normalizer.mlp(torch.stack((images, texts)))
        assert outputs.abs().max() > 1000 if factor else not outputs.any()
        assert_finite_training(objective, images, texts)


def test_predictions_far_above_and_far_below_are_finite_in_value(features: FeatureMaker) -> None:
    """α wrong by 200 either way: exp(−α)·g is clamped, not infinite, and a vanishing weight is 0, not NaN."""
    v = direction(torch.float32)
    images, texts = adversarial("two samples, s_ii = -1, s_ij = +1", torch.float32)
    objective = make_objective(
        "--objective neuclip --npn_num_protos 2 --npn_repetition 0 --npn_restart_iter 0 --gamma 0 --fastclip_eps 0",
        RunShape(DIM, 2, 1, 10, 2),
    )
    objective.step = 1
    assert isinstance(objective, NeuCLIP)
    assert isinstance(objective.normalizer, PrototypeNormalizer)
    objective.normalizer.active = 2
    objective.normalizer.prototypes.copy_(torch.stack((v, v)).expand(2, 2, DIM))
    # Anchor 0 (image v, text −v): its image meets the prototypes at +1, where α = 200 is right; its text at −1, where
    # α = 0 against T = 200.
    alpha_gap = objective(images, texts, torch.tensor(COLDEST)).metrics["log_normalizer_gap_max"]
    assert float(alpha_gap) == pytest.approx(200.0, rel=1e-3)


@pytest.mark.parametrize("extra", ["", "--no-fit_w_prev", "--z_beta_max 1 --beta_decay_epochs 0.5", "--div_reg_coef 0"])
@pytest.mark.parametrize("loss", ["log_l2", "kl_div_asym", "kl_div_sym", "js_div"])
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_amorlip_is_finite_with_predictions_off_by_hundreds(loss: str, extra: str, offset: float) -> None:
    """All networks say a number far below or above every target; adversarial features, τ = 0.01, in a later epoch."""
    for case in CASES:
        images, texts = adversarial(case, torch.float32)
        flags = f"--objective amorlip --lambda_loss_type {loss} --reinit_lambda_every_n_epochs 0 {extra}"
        objective = make_objective(flags, RunShape(DIM, images.shape[0], 1, 3, 4))
        assert isinstance(objective, AmorLIP)
        networks = (objective.normalizer.current, objective.normalizer.average)
        for network in networks:
            network.named_parts(network.weights)["linear_3.bias"].fill_(offset)
        objective.start_epoch(2)
        for _ in range(3):
            assert_finite_step(objective, images, texts)


@pytest.mark.parametrize("loss", ["log_l2", "kl_div_asym", "kl_div_sym", "js_div"])
def test_amorlip_comes_back_from_far_below(loss: str, features: FeatureMaker) -> None:
    """Where a divergence is clamped it still has a gradient, without any help from the squared difference."""
    objective = make_objective(
        f"--objective amorlip --lambda_loss_type {loss} --div_reg_coef 0 --lambda-lr 0.1 --no-fit_w_prev",
        RunShape(6, 8, 1, 3, 1),
    )
    assert isinstance(objective, AmorLIP)
    network = objective.normalizer.current
    network.named_parts(network.weights)["linear_3.bias"].fill_(-300.0)
    images, texts = features(0, 8, dtype=torch.float32)
    predicted = []
    for _ in range(5):
        objective(images, texts, torch.tensor(COLDEST))
        predicted.append(float(network(torch.stack((images, texts)).detach()).mean()))
    assert predicted == sorted(predicted)
    assert predicted[-1] > predicted[0] + 5


# Each objective, and NeuCLIP with an MLP and with weights for the outer optimizer.
LINES = {name: f"--objective {name} --npn_num_protos 8" for name in sorted(OBJECTIVES)} | {
    "neuclip, mlp": "--objective neuclip --npn_arch mlp",
    "neuclip, simultaneous": "--objective neuclip --npn_optimization simultaneous --npn_num_protos 8",
    "neuclip, simultaneous, mlp": "--objective neuclip --npn_optimization simultaneous --npn_arch mlp",
}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", LINES)
def test_autocast_changes_nothing(name: str, chunk: str, features: FeatureMaker) -> None:
    results = []
    for enabled in (False, True):
        objective = make_objective(f"{LINES[name]} --data_size 8 {chunk}", RunShape(6, 8, 1, 10, 2))
        images, texts = features(1, 8, dtype=torch.float32)
        scale = torch.tensor(20.0, requires_grad=True)
        bias = None if objective.initial_logit_bias is None else torch.tensor(-3.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = objective(images, texts, scale, bias, torch.arange(8))
        # Outside of the context, as PyTorch asks for: operators of a backward inside of it would be cast again.
        gradients = torch.autograd.grad(output.loss, (images, texts, scale, *objective.parameters()))
        assert output.loss.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in output.metrics.values())
        results.append((output.loss, *gradients, *output.metrics.values()))
    for plain, autocast in zip(*results):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_bfloat16_features_give_the_loss_of_their_float32_copies(name: str, chunk: str, features: FeatureMaker) -> None:
    losses = []
    for convert in (lambda x: x, lambda x: x.float()):
        objective = make_objective(
            f"--objective {name} {chunk} --npn_num_protos 8 --data_size 8", RunShape(6, 8, 1, 10, 2)
        )
        images, texts = (convert(x.detach()) for x in features(1, 8, dtype=torch.bfloat16))
        bias = None if objective.initial_logit_bias is None else torch.tensor(-3.0)
        losses.append(objective(images, texts, torch.tensor(20.0), bias, torch.arange(8)).loss)
    assert losses[0].dtype == torch.float32
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_float32_is_close_to_float64_at_the_lowest_temperature(name: str, chunk: str, features: FeatureMaker) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        objective = make_objective(
            f"--objective {name} {chunk} --npn_num_protos 8 --npn_repetition 3 --data_size 16",
            RunShape(6, 16, 1, 10, 2),
        ).to(dtype)
        for seed in range(2):
            images, texts = (x.detach().requires_grad_() for x in features(seed, 16, dtype=torch.float32))
            wide = (images.to(dtype), texts.to(dtype))
            bias = None if objective.initial_logit_bias is None else torch.tensor(-3.0, dtype=dtype)
            loss = objective(*wide, torch.tensor(COLDEST, dtype=dtype), bias, torch.arange(16)).loss
        results.append((loss.double(), *torch.autograd.grad(loss, (images, texts))))
    for narrow, wide in zip(*results):
        torch.testing.assert_close(narrow, wide, rtol=1e-3, atol=1e-4 * float(wide.detach().abs().max()))


@pytest.mark.parametrize("optimizer", ["adagrad_norm", "adagrad"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_feature_row_of_zeros_does_not_poison_the_prototypes(
    optimizer: str, which: int, features: FeatureMaker
) -> None:
    """F.normalize of an all-zero embedding is zero. As a prototype it must not turn all predictions into NaN."""
    objective = make_objective(
        f"--objective neuclip --npn_num_protos 8 --npn_optimizer {optimizer} --npn_restart_iter 0",
        RunShape(6, 8, 1, 10, 2),
    )
    for step in range(3):
        pair = [x.detach().clone() for x in features(step, 8, dtype=torch.float32)]
        if step == 0:
            pair[which][3] = 0.0
        assert_finite_step(objective, pair[0].requires_grad_(), pair[1].requires_grad_())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", LINES)
def test_float64_features_are_welcome_in_a_float32_objective(name: str, chunk: str, features: FeatureMaker) -> None:
    """forward's contract is float32 or better; nobody has to know that an objective holds buffers."""
    objective = make_objective(f"{LINES[name]} --data_size 8 {chunk}", RunShape(6, 8, 1, 10, 2))
    for step in range(2):
        images, texts = features(step, 8)
        bias = None if objective.initial_logit_bias is None else torch.tensor(-3.0).double()
        loss = objective(images, texts, torch.tensor(20.0).double(), bias, torch.arange(8)).loss
        assert torch.isfinite(loss)
        assert loss.dtype == torch.float64
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in objective.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "flags",
    [
        *(f"--objective {name} --npn_num_protos 8" for name in sorted(OBJECTIVES)),
        *("--objective neuclip --npn_num_protos 20", "--objective neuclip --npn_optimizer adagrad --npn_lr 0.1"),
        *("--objective neuclip --npn_arch mlp", "--objective neuclip --npn_arch mlp --npn_optimizer adagrad_norm"),
        *(f"--amorlip --lambda_loss_type {loss} --reinit_lambda_every_n_epochs 0" for loss in ("log_l2", "js_div")),
        "--amorlip --no-fit_w_prev",
        "--fastclip --temperature_scheme individual_learnable",
    ],
)
@pytest.mark.parametrize("when", [0, 2])
def test_a_broken_batch_leaves_no_trace(flags: str, bad: float, when: int, features: FeatureMaker) -> None:
    """As when a tower overflows in half precision: the step is lost, what the objective has learnt is not."""
    objective = make_objective(f"{flags} --npn_restart_iter 0 --data_size 8", RunShape(6, 8, 1, 3, 4))
    for step in range(8):
        if step % 3 == 0:
            objective.start_epoch(step // 3)
        images, texts = (x.detach().clone() for x in features(step, 8, dtype=torch.float32))
        if step == when:
            images[3] = bad
            bias = None if objective.initial_logit_bias is None else torch.tensor(-3.0)
            objective(images, texts, torch.tensor(20.0), bias, torch.arange(8))
        else:
            assert_finite_step(objective, images.requires_grad_(), texts.requires_grad_())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("bias", [-1e4, -10.0, 0.0, 1e4])
def test_sigmoids_in_chunks_are_as_exact_in_float32(scale: float, bias: float, features: FeatureMaker) -> None:
    """Where sigmoid(x) is 0 or 1 in float32, losses are linear in x and gradients vanish, neither by overflow."""
    results = []
    for chunk, dtype in (("", torch.float64), ("--loss-chunk-size 3", torch.float32)):
        objective = make_objective(f"--objective siglip {chunk}", RunShape(6, 8, 1, 10, 2))
        inputs = [x.detach().to(dtype).requires_grad_() for x in features(2, 8, dtype=torch.float32)]
        inputs += [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (scale, bias)]
        loss = objective(*inputs).loss
        results.append([value.double() for value in (loss, *torch.autograd.grad(loss, inputs))])
    for exact, chunked in zip(*results):
        torch.testing.assert_close(chunked, exact, rtol=1e-4, atol=1e-5 * float(exact.detach().abs().max()))


def test_a_vanishing_derivative_of_a_matching_pair_is_not_rounded_to_zero() -> None:
    """exp(−30) of a matching pair with x = 30: sigmoid(30) − 1 is 0 in float32."""
    same = F.normalize(torch.eye(4, DIM), dim=1)
    bias = torch.tensor(0.0, requires_grad=True)
    objective = make_objective("--objective siglip --loss-chunk-size 1", RunShape(DIM, 4, 1, 10, 2))
    images = same.clone().requires_grad_()
    objective(images, same, torch.tensor(30.0), bias).loss.backward()
    assert images.grad is not None
    expected = -30.0 * math.exp(-30.0) / 4
    assert float(images.grad[0, 0]) == pytest.approx(expected, rel=1e-5, abs=0.0)
