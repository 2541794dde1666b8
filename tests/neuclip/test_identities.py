"""What the methods must agree on with each other and with hand-written losses, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip import OBJECTIVES, Objective, RunShape, make_objective
from neuclip.normalizers import MLPNormalizer, PrototypeNormalizer, Unified
from neuclip.objectives.siglip import VARIANTS
from neuclip.pairwise import gather_batch, pairwise_gradient

from .conftest import FeatureMaker
from .reference import batch_g, batch_global_loss

N, DIM = 8, 6
SHAPE = RunShape(DIM, N, 1, steps_per_epoch=10, epochs=2)
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def make(flags: str) -> Objective:
    return make_objective(flags, SHAPE).double()


def prototypes(m: int, eps: float) -> PrototypeNormalizer:
    """An NPN that nobody trains, for batches of m samples."""
    return PrototypeNormalizer(m, DIM, eps, Unified(), None, m).double()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def cross_entropies(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """½·mean_i −log softmax of the matching pair, among texts and among images."""
    terms = []
    for i in range(images.shape[0]):
        for row in (logit_scale * texts @ images[i], logit_scale * images @ texts[i]):
            terms.append(-torch.log(row[i].exp() / row.exp().sum()))
    return torch.stack(terms).mean()


def sigmoids(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """−1/N Σ_ij log sigmoid(±(logit_scale·s_ij + logit_bias))."""
    terms = []
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            logit = logit_scale * (image @ text) + logit_bias
            terms.append(torch.log(1 / (1 + torch.exp(-logit if i == j else logit))))
    return -torch.stack(terms).sum() / images.shape[0]


@pytest.mark.parametrize("chunk", ["", "--loss-chunk-size 3"])
def test_openclip_is_the_mean_of_two_cross_entropies(chunk: str, features: FeatureMaker) -> None:
    images, texts = features(0, N)
    scale = scalar(14.0)
    inputs = (images, texts, scale)
    loss = make(f"--objective openclip {chunk}")(*inputs).loss
    expected = cross_entropies(*inputs)
    torch.testing.assert_close(loss, expected, **EXACT)
    for value, target in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(value, target, **EXACT)


@pytest.mark.parametrize("chunk", ["", "--loss-chunk-size 3"])
def test_a_bias_of_openclip_changes_nothing_and_has_a_gradient(chunk: str, features: FeatureMaker) -> None:
    """DistributedDataParallel waits for the gradient of every parameter of a model, of a logit_bias too."""
    images, texts = features(0, N)
    scale, bias = scalar(14.0), scalar(-2.0)
    loss = make(f"--objective openclip {chunk}")(images, texts, scale, bias).loss
    torch.testing.assert_close(loss, cross_entropies(images, texts, scale), **EXACT)
    (gradient,) = torch.autograd.grad(loss, bias)
    assert abs(float(gradient)) < 1e-13


@pytest.mark.parametrize("flags", [*(f"--loss-dist-impl {name}" for name in VARIANTS), "--loss-chunk-size 3"])
def test_siglip_is_the_sum_of_sigmoids(flags: str, features: FeatureMaker) -> None:
    images, texts = features(0, N)
    inputs = (images, texts, scalar(10.0), scalar(-3.0))
    loss = make(f"--objective siglip {flags}")(*inputs).loss
    expected = sigmoids(*inputs)
    torch.testing.assert_close(loss, expected, **EXACT)
    for value, target in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(value, target, **EXACT)


def test_siglip_without_a_bias_is_refused(features: FeatureMaker) -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        make("--objective siglip")(*features(0, N), scalar(10.0))


@pytest.mark.parametrize("m", [3, N, 20])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.1])
def test_neuclip_with_gamma_1_is_the_global_loss_of_the_mini_batch(m: int, eps: float, features: FeatureMaker) -> None:
    objective = make(
        f"--objective neuclip --npn_num_protos {m} --gamma 1 --gamma_schedule constant --rho 6.5 --fastclip_eps {eps}"
    )
    for seed in range(2):
        images, texts = features(seed, N)
        inputs = (images, texts, scalar(11.0 + seed))
        loss = objective(*inputs).loss
        expected = batch_global_loss(images, texts, 1 / inputs[2], eps, 6.5)
        torch.testing.assert_close(loss, expected, **EXACT)
        for value, target in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
            torch.testing.assert_close(value, target, **EXACT)


@pytest.mark.parametrize("eps", [0.0, 1e-14, 0.1])
def test_fastclip_with_gamma_1_is_the_global_loss_of_the_mini_batch(eps: float, features: FeatureMaker) -> None:
    """Whatever it remembers; and so it is NeuCLIP with γ = 1."""
    flags = f"--gamma 1 --gamma_schedule constant --rho 6.5 --fastclip_eps {eps}"
    fastclip = make(f"--fastclip --multiply_tau --data_size {N} {flags}")
    neuclip = make(f"--fastclip --npn --npn_num_protos 4 {flags}")
    for seed in range(3):
        images, texts = features(seed, N)
        inputs = (images, texts, scalar(11.0 + seed))
        loss = fastclip(*inputs, None, torch.arange(N)).loss
        expected = batch_global_loss(images, texts, 1 / inputs[2], eps, 6.5)
        same = neuclip(*inputs).loss
        torch.testing.assert_close(loss, expected, **EXACT)
        torch.testing.assert_close(loss, same, **EXACT)
        gradients = [torch.autograd.grad(value, inputs) for value in (loss, expected, same)]
        for value, target, other in zip(*gradients):
            torch.testing.assert_close(value, target, **EXACT)
            torch.testing.assert_close(value, other, **EXACT)


def test_fastclip_on_one_batch_again_and_again_has_the_batch_estimate(features: FeatureMaker) -> None:
    """A moving average of one and the same value is that value, whatever γ."""
    objective = make(f"--fastclip --multiply_tau --gamma 0.3 --gamma_schedule constant --data_size {N}")
    images, texts = features(0, N)
    for _ in range(4):
        metrics = objective(images, texts, scalar(10.0), None, torch.arange(N)).metrics
        assert float(metrics["log_normalizer_gap_max"]) < 1e-12


def test_fastclip_versions_share_the_direction_of_the_encoders(features: FeatureMaker) -> None:
    """The factor τ is all that differs between v0 and v3, and v2 begins as v3 does."""
    images, texts = features(0, N)
    found = {}
    for name, flags in {"v0": "", "v3": "--multiply_tau", "v2": "--temperature_scheme individual_learnable"}.items():
        objective = make(f"--fastclip --temperature 0.125 {flags} --data_size {N}")
        loss = objective(images, texts, scalar(8.0), None, torch.arange(N)).loss
        found[name] = torch.stack(torch.autograd.grad(loss, (images, texts)))
    torch.testing.assert_close(found["v0"], 8.0 * found["v3"], **EXACT)
    torch.testing.assert_close(found["v2"], found["v3"], **EXACT)


def test_the_global_loss_of_a_batch_is_near_tau_times_the_cross_entropies(features: FeatureMaker) -> None:
    """With hard negatives log(1 + (N−1)·g) ≈ log(N−1) + log g, so that learning rates carry over from OpenCLIP."""
    images, texts = features(0, N)
    with torch.no_grad():
        texts.copy_(texts.roll(1, dims=0))
    scale = scalar(60.0)
    ours = make("--objective neuclip --npn_num_protos 4 --gamma 1 --gamma_schedule constant --rho 0")
    theirs = make("--objective openclip")
    a = torch.autograd.grad(scale.detach() * ours(images, texts, scale).loss, (images, texts))
    b = torch.autograd.grad(theirs(images, texts, scale).loss, (images, texts))
    for value, target in zip(a, b):
        torch.testing.assert_close(value, target, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.1])
def test_prototypes_at_the_whole_batch_add_the_matching_pair_to_the_mean(eps: float, features: FeatureMaker) -> None:
    """A restart with m = N puts every anchor's own partner among its prototypes: exp(h_ii) = 1 joins N−1 negatives.

    So α_i = log(ε + (1 + (N−1)·g_i)/N), which is not the batch's own estimate; see the next test for that.
    """
    images, texts = features(2, N)
    normalizer = prototypes(N, eps)
    batch = gather_batch(images, texts)
    normalizer.restart(batch)
    g = torch.stack(batch_g(images, texts, 1 / scalar(12.0))).detach()
    expected = torch.log(eps + (1 + (N - 1) * g) / N)
    torch.testing.assert_close(normalizer.predict(batch, scalar(12.0).detach()), expected, **EXACT)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.1])
def test_prototypes_at_the_other_samples_give_the_batch_estimate(eps: float, features: FeatureMaker) -> None:
    """The prediction for anchor i is log(ε + g_i) exactly when the prototypes are the N−1 samples j ≠ i of the batch."""
    images, texts = features(2, N)
    scale = scalar(12.0)
    batch = gather_batch(images, texts)
    predicted = torch.empty(2, N, dtype=torch.float64)
    for i in range(N):
        others = [j for j in range(N) if j != i]
        normalizer = prototypes(N - 1, eps)
        normalizer.restart(gather_batch(images[others], texts[others]))
        predicted[:, i] = normalizer.predict(batch, scale.detach())[:, i]
    estimate = torch.log(eps + torch.stack(batch_g(images, texts, 1 / scale.detach()))).detach()
    torch.testing.assert_close(predicted, estimate, **EXACT)
    # Then the encoders' gradient is that of the mini-batch global loss.
    inputs = (images, texts)
    gradient = pairwise_gradient(batch, predicted, scale.detach()).features
    target = torch.autograd.grad(batch_global_loss(images, texts, 1 / scale.detach(), eps, 8.0), inputs)
    torch.testing.assert_close(gradient, torch.stack(target), **EXACT)


@pytest.mark.parametrize(
    "flags",
    [
        f"--npn_num_protos {N} --npn_lr 0.3",
        f"--npn_num_protos {N} --npn_lr 0.3 --npn_objective separate",
        "--npn_arch mlp --npn_lr 0.1",
        "--npn_arch mlp --npn_lr 0.1 --npn_objective separate",
    ],
)
def test_many_updates_on_one_batch_approach_its_normalizers(flags: str, features: FeatureMaker) -> None:
    """On one batch the optimum of either NPN objective is α_i = log(ε + g_i); a network that is large enough comes close."""
    images, texts = features(3, N)
    gaps = []
    for updates in (0, 10, 300):
        objective = make(f"--objective neuclip {flags} --npn_repetition {updates} --gamma 0")
        gaps.append(float(objective(images, texts, scalar(10.0)).metrics["log_normalizer_gap"]))
    assert gaps[1] < 0.7 * gaps[0]
    assert gaps[2] < 0.25 * gaps[0]


@pytest.mark.parametrize("network", [f"--npn_num_protos {N}", "--npn_arch mlp"])
def test_optimizations_agree_before_anything_is_learnt(network: str, features: FeatureMaker) -> None:
    """Simultaneous optimization predicts once, as alternating does with T_u = 0: the encoders cannot tell them apart."""
    results = []
    for flags in ("--npn_repetition 0", "--npn_optimization simultaneous"):
        inputs = (*features(3, N), scalar(10.0))
        output = make(f"--objective neuclip {network} {flags}")(*inputs)
        results.append((output.loss, *torch.autograd.grad(output.loss, inputs), output.metrics["inner_loss_before"]))
    for value, target in zip(*results):
        torch.testing.assert_close(value, target, **EXACT)


def run_once(name: str, features: FeatureMaker, report: bool = True) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    objective = make(f"--objective {name} --rho 5 --data_size {N}")
    objective.report = report
    images, texts = features(4, N)
    bias = None if objective.initial_logit_bias is None else scalar(objective.initial_logit_bias)
    output = objective(images, texts, scalar(13.0), bias, torch.arange(N))
    return output.metrics, (images.detach(), texts.detach())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_metrics_common_to_all_mean_the_same(name: str, features: FeatureMaker) -> None:
    metrics, (images, texts) = run_once(name, features)
    tau = torch.tensor(1 / 13.0, dtype=torch.float64)
    torch.testing.assert_close(metrics["contrastive_loss"], cross_entropies(images, texts, 1 / tau), **EXACT)
    torch.testing.assert_close(metrics["temperature"], tau, **EXACT)
    # The normalizers may be the method's own, the formula may not.
    torch.testing.assert_close(metrics["global_loss"], tau * (metrics["log_normalizer"] + 5.0), **EXACT)
    for key, value in metrics.items():
        assert value.dim() == 0, key
        assert not value.requires_grad, key
        assert torch.isfinite(value), key


@pytest.mark.parametrize("name", ["openclip", "siglip"])
def test_global_loss_at_the_normalizers_of_the_batch(name: str, features: FeatureMaker) -> None:
    metrics, (images, texts) = run_once(name, features)
    expected = batch_global_loss(images, texts, torch.tensor(1 / 13.0, dtype=torch.float64), 0.0, 5.0)
    torch.testing.assert_close(metrics["global_loss"], expected, **EXACT)
    assert float(metrics["log_normalizer_gap_max"]) == 0.0


# Each objective, and NeuCLIP with another network and with weights for the outer optimizer.
LINES = (
    *sorted(OBJECTIVES),
    "neuclip --npn_num_protos 20 --npn_objective separate",
    "neuclip --npn_arch mlp",
    "neuclip --npn_optimization simultaneous",
    "neuclip --npn_optimization simultaneous --npn_arch mlp",
)


@pytest.mark.parametrize("name", LINES)
def test_no_metrics_between_logging_steps(name: str, features: FeatureMaker) -> None:
    assert run_once(name, features, report=False)[0] == {}


@pytest.mark.parametrize("name", LINES)
def test_reporting_changes_neither_loss_nor_gradient(name: str, features: FeatureMaker) -> None:
    results = []
    for report in (True, False):
        objective = make(f"--objective {name} --data_size {N}")
        objective.report = report
        for seed in range(3):
            images, texts = features(seed, N)
            bias = None if objective.initial_logit_bias is None else scalar(-2.0)
            scale = scalar(13.0)
            loss = objective(images, texts, scale, bias, torch.arange(N)).loss
        inputs = (images, texts, scale, *objective.parameters())
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for with_report, without in zip(*results):
        assert torch.equal(with_report, without)


@pytest.mark.parametrize(
    ("flags", "passes"),
    [("--npn_repetition 4", 5), ("--npn_optimization simultaneous", 1)],
)
@pytest.mark.parametrize("network", ["--npn_num_protos 20", "--npn_arch mlp"])
def test_passes_of_the_network_between_logging_steps(
    network: str, flags: str, passes: int, features: FeatureMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each update and one for α, or one for both: reports that are not made cost nothing."""
    calls = []
    for cls in (PrototypeNormalizer, MLPNormalizer):
        original = cls._log_normalizers
        monkeypatch.setattr(cls, "_log_normalizers", lambda *given, o=original: calls.append(1) or o(*given))
    for report in (False, True):
        objective = make(f"--objective neuclip {network} {flags}")
        objective.report = report
        objective(*features(0, N), scalar(13.0))
        assert len(calls) == (passes if not report or passes == 1 else passes + 1)
        calls.clear()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_logit_scale_of_one_element_is_as_good_as_a_scalar(name: str, features: FeatureMaker) -> None:
    losses = []
    for shape in ((), (1,)):
        bias = None if OBJECTIVES[name].initial_logit_bias is None else scalar(-2.0).detach().reshape(shape)
        scale = scalar(13.0).detach().reshape(shape).requires_grad_()
        loss = make(f"--objective {name} --data_size {N}")(*features(0, N), scale, bias, torch.arange(N)).loss
        loss.backward()
        assert scale.grad is not None
        assert scale.grad.shape == shape
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]


def test_contrastive_loss_of_unrelated_features_is_log_n() -> None:
    same = F.normalize(torch.ones(N, DIM, dtype=torch.float64), dim=1)
    metrics = make("--objective openclip")(same, same, scalar(50.0)).metrics
    assert float(metrics["contrastive_loss"]) == pytest.approx(math.log(N), rel=1e-12)
