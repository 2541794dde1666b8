"""How the command line chooses an objective and checks what it is given."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace, _ArgumentGroup

import pytest
import torch
from torch import Tensor

from neuclip import OBJECTIVES, Objective, Output, RunShape, make_objective
from neuclip.normalizers import (
    AdaGrad,
    AdaGradNorm,
    Alternating,
    MLPNormalizer,
    PrototypeNormalizer,
    Separate,
    Simultaneous,
    Unified,
    UnitRowsAdaGradNorm,
)
from neuclip.objectives import TemperatureLearning, add_arguments, build_objective, resolve
from neuclip.objectives.neuclip import NeuCLIP
from neuclip.objectives.siglip import VARIANTS

from .conftest import FeatureMaker

SHAPE = RunShape(embed_dim=6, batch_size=4, world_size=2, steps_per_epoch=10, epochs=3)


def parse(line: str) -> Namespace:
    parser = ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(line.split())
    args.epochs = SHAPE.epochs
    return args


def resolved(line: str) -> Namespace:
    args = parse(line)
    resolve(args)
    return args


def neuclip(line: str) -> NeuCLIP:
    objective = make_objective(line, SHAPE)
    assert isinstance(objective, NeuCLIP)
    return objective


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "openclip"),
        ("--siglip", "siglip"),
        ("--npn", "neuclip"),
        ("--fastclip --npn", "neuclip"),
        ("--objective neuclip --npn", "neuclip"),
        ("--objective neuclip --fastclip --npn", "neuclip"),
        ("--objective neuclip --fastclip", "neuclip"),
        ("--objective siglip --siglip", "siglip"),
        ("--objective openclip", "openclip"),
    ],
)
def test_objective_and_its_synonyms(line: str, name: str) -> None:
    args = parse(line)
    assert resolve(args) is OBJECTIVES[name]
    assert args.objective == name
    assert type(make_objective(line, SHAPE)) is OBJECTIVES[name]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_name_builds_its_objective_and_states_its_spellings(name: str) -> None:
    assert type(make_objective(f"--objective {name} --data_size 10", SHAPE)) is OBJECTIVES[name]
    assert OBJECTIVES[name].name == name
    for synonym in OBJECTIVES[name].synonyms:
        args = parse(" ".join(f"--{flag}" for flag in synonym) + " --data_size 10")
        assert resolve(args) is OBJECTIVES[name]
        assert all(getattr(args, flag) for flag in synonym)


@pytest.mark.parametrize(
    "line",
    [
        *("--npn", "--objective neuclip", "--siglip", "", "--npn --npn_arch mlp", "--fastclip --data_size 9"),
        *(f"--npn --npn_optimization simultaneous --npn_arch {arch}" for arch in ("prototypes", "mlp")),
    ],
)
def test_resolving_twice_changes_nothing(line: str) -> None:
    """As when arguments are read back from a checkpoint."""
    args = resolved(line)
    before = dict(vars(args))
    resolve(args)
    assert vars(args) == before


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--objective openclip --npn", ("--objective openclip", "--npn", "drop")),
        ("--objective siglip --fastclip --npn", ("--objective siglip", "--fastclip --npn", "drop")),
        ("--objective neuclip --siglip", ("--objective neuclip", "--siglip", "drop")),
        ("--objective neuclip --npn --siglip", ("--objective neuclip", "--npn --siglip", "drop")),
        ("--siglip --npn", ("--npn --siglip", "--objective {")),
        ("--siglip --fastclip --npn", ("--fastclip --npn --siglip", "--objective {")),
    ],
)
def test_contradictions_name_the_flags_and_the_remedy(line: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="--") as caught:
        resolved(line)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("gamma", value) for value in ("-0.1", "1.5", "nan")),
        *(("gamma_decay_epochs", value) for value in ("0", "-1", "nan")),
        *(("fastclip_eps", value) for value in ("-0.001", "nan", "inf")),
        *(("rho", value) for value in ("-1", "nan", "inf")),
        *(("npn_num_protos", value) for value in ("0", "-5")),
        ("npn_repetition", "-1"),
        ("npn_restart_iter", "-1"),
        *(("npn_lr", value) for value in ("0", "-1", "nan", "inf")),
        *(("npn_wd", value) for value in ("0.1", "nan")),
        ("temperature_scheme", "individual_learnable"),
    ],
)
def test_a_bad_value_is_named_with_its_flag_before_anything_is_built(flag: str, value: str) -> None:
    with pytest.raises(ValueError, match="--") as caught:
        resolved(f"--objective neuclip --{flag} {value}")
    message = str(caught.value)
    assert f"--{flag}" in message
    assert (value if value.isalpha() or "_" in value else str(float(value)).removesuffix(".0")) in message
    assert ":" in message  # the remedy follows


@pytest.mark.parametrize("value", ["-0.1", "nan", "inf"])
def test_a_bad_weight_decay_is_refused_with_coordinate_wise_adagrad(value: str) -> None:
    with pytest.raises(ValueError, match="--npn_wd"):
        resolved(f"--objective neuclip --npn_optimizer adagrad --npn_wd {value}")


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_constant_temperature_is_honoured_or_refused(name: str) -> None:
    """A run that asks for a constant temperature must not get a learnable one in silence."""
    refusal = ""
    try:
        objective = make_objective(f"--objective {name} --temperature_scheme global_constant --data_size 10", SHAPE)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "--temperature_scheme" in refusal
    else:
        assert objective.temperature_learning is TemperatureLearning.CONSTANT


@pytest.mark.parametrize(
    "line",
    [
        "--objective cyclip",
        "--objective neuclip --npn_optimizer adam",
        "--objective neuclip --npn_arch transformer",
        "--objective neuclip --npn_objective kl",
        "--objective neuclip --npn_optimization both",
        "--objective neuclip --gamma_schedule linear",
        "--objective siglip --loss-dist-impl ring",
        "--objective neuclip --npn_num_proto 5",
        "--objective neuclip --npn_num_protos many",
    ],
)
def test_unknown_choices_and_flags_end_the_program(line: str) -> None:
    with pytest.raises(SystemExit):
        make_objective(line, SHAPE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_a_way_of_texts_between_ranks_exclude_each_other(variant: str) -> None:
    """Chunks are of gathered features; even the default, once asked for, would not be what happens."""
    line = f"--objective siglip --loss-dist-impl {variant}"
    with pytest.raises(ValueError, match=f"--loss-dist-impl {variant} .*--loss-chunk-size 64.*drop one"):
        resolved(f"{line} --loss-chunk-size 64")
    assert resolved(line).loss_dist_impl == variant
    assert resolved(f"--objective openclip --loss-dist-impl {variant} --loss-chunk-size 64").objective == "openclip"


def test_the_way_of_texts_between_ranks_is_settled_unless_there_are_chunks() -> None:
    assert resolved("--objective siglip").loss_dist_impl == "bidir"
    args = resolved("--objective siglip --loss-chunk-size 64")
    before = dict(vars(args))
    resolve(args)
    assert vars(args) == before
    assert build_objective(args, SHAPE).chunk_rows == 64


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_chunk_of_no_rows_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"--loss-chunk-size {value} is too small"):
        resolved(f"--loss-chunk-size {value}")


def test_neuclip_fills_in_its_defaults() -> None:
    args = resolved("--objective neuclip")
    assert (args.gamma, args.gamma_schedule, args.gamma_decay_epochs) == (0.42, "cosine_step", 3.0)
    assert (args.fastclip_eps, args.rho, args.multiply_tau, args.fastclip, args.npn) == (1e-8, 8.0, True, True, True)
    objective = neuclip("--objective neuclip")
    assert objective.gamma is not None
    assert (objective.gamma.gamma, objective.gamma.kind, objective.gamma.steps_per_epoch) == (0.42, "cosine_step", 10)
    assert (objective.restart_every, objective.rho) == (500, 8.0)
    assert objective.optimization == Alternating(10)
    assert objective.log_eps == objective.normalizer.log_eps == math.log(1e-8)
    assert isinstance(objective.normalizer, PrototypeNormalizer)
    assert objective.normalizer.num_prototypes == 4096
    assert objective.normalizer.prototypes.shape == (2, 4096, 6)
    assert isinstance(objective.normalizer.optimizer, UnitRowsAdaGradNorm)
    assert objective.normalizer.optimizer.lr == 1.0
    assert isinstance(objective.normalizer.inner_objective, Unified)
    assert objective.temperature_learning is TemperatureLearning.OUTER


def test_neuclip_keeps_what_is_given() -> None:
    objective = neuclip(
        "--npn --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 1.5 --fastclip_eps 1e-6 --rho 0 "
        "--npn_num_protos 5 --npn_repetition 0 --npn_restart_iter 0 --npn_lr 0.25 --npn_wd 0.5 --npn_optimizer adagrad "
        "--temperature_scheme global_constant"
    )
    assert objective.gamma is not None
    assert (objective.gamma.kind, objective.gamma.gamma, objective.gamma.decay_epochs) == ("cosine", 0.2, 1.5)
    assert (objective.restart_every, objective.rho) == (0, 0.0)
    assert objective.optimization == Alternating(0)
    assert objective.log_eps == objective.normalizer.log_eps == math.log(1e-6)
    optimizer = objective.normalizer.optimizer
    assert isinstance(optimizer, AdaGrad)
    assert (optimizer.lr, optimizer.weight_decay) == (0.25, 0.5)
    assert isinstance(objective.normalizer, PrototypeNormalizer)
    assert objective.normalizer.prototypes.shape == (2, 5, 6)
    assert objective.temperature_learning is TemperatureLearning.CONSTANT


def test_an_mlp_has_defaults_of_its_own() -> None:
    args = resolved("--objective neuclip --npn_arch mlp")
    found = (args.npn_lr, args.npn_optimizer, args.npn_restart_iter, args.npn_repetition, args.npn_num_protos)
    assert found == (0.01, "adagrad", 0, 10, None)
    objective = neuclip("--objective neuclip --npn_arch mlp --npn_objective separate")
    assert isinstance(objective.normalizer, MLPNormalizer)
    assert isinstance(objective.normalizer.inner_objective, Separate)
    assert isinstance(objective.normalizer.optimizer, AdaGrad)
    assert objective.normalizer.optimizer.lr == 0.01
    assert objective.normalizer.mlp.shapes["linear_1.weight"] == (6, 6)
    assert (objective.restart_every, objective.optimization) == (0, Alternating(10))


def test_an_mlp_keeps_what_is_given() -> None:
    flags = "--npn_lr 0.5 --npn_optimizer adagrad_norm --npn_wd 0.2 --npn_restart_iter 7 --npn_repetition 2"
    objective = neuclip(f"--objective neuclip --npn_arch mlp {flags}")
    optimizer = objective.normalizer.optimizer
    assert type(optimizer) is AdaGradNorm
    assert (optimizer.lr, optimizer.weight_decay) == (0.5, 0.2)
    assert (objective.restart_every, objective.optimization) == (7, Alternating(2))


@pytest.mark.parametrize(("arch", "restart"), [("prototypes", 500), ("mlp", 0)])
def test_simultaneous_leaves_the_network_to_the_outer_optimizer(arch: str, restart: int) -> None:
    line = f"--objective neuclip --npn_arch {arch} --npn_optimization simultaneous --npn_wd 0.1"
    args = resolved(line)
    assert (args.npn_lr, args.npn_optimizer, args.npn_repetition, args.npn_restart_iter) == (None, None, None, restart)
    objective = neuclip(line)
    assert isinstance(objective.optimization, Simultaneous)
    assert objective.normalizer.optimizer is None
    assert objective.outer_weight_decay == 0.1
    parameters = dict(objective.named_parameters())
    assert parameters
    assert all(parameter.requires_grad and parameter.shape[0] == 2 for parameter in parameters.values())
    if arch == "prototypes":
        assert {name: p.shape for name, p in parameters.items()} == {"normalizer.prototypes": (2, 4096, 6)}
    assert list(neuclip(f"--objective neuclip --npn_arch {arch}").parameters()) == []


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--npn_arch mlp --npn_num_protos 64", ("--npn_num_protos 64", "--npn_arch mlp", "leave it out")),
        ("--npn_optimization simultaneous --npn_lr 0.5", ("--npn_lr 0.5", "simultaneous", "--lr", "leave it out")),
        ("--npn_optimization simultaneous --npn_repetition 0", ("--npn_repetition 0", "simultaneous", "leave it out")),
        (
            "--npn_optimization simultaneous --npn_arch mlp --npn_optimizer adagrad",
            ("--npn_optimizer adagrad", "simultaneous", "--npn_optimization alternating"),
        ),
        ("--npn_arch mlp --npn_compile", ("--npn_compile", "--npn_arch mlp", "leave it out")),
        ("--npn_optimization simultaneous --npn_compile", ("--npn_compile", "simultaneous", "leave it out")),
        ("--npn_arch mlp --npn_wd -1", ("--npn_wd -1.0", "at least 0")),
        ("--npn_optimization simultaneous --npn_wd nan", ("--npn_wd nan", "at least 0")),
        ("--npn_arch mlp --npn_optimizer adagrad_norm --npn_lr 0", ("--npn_lr 0.0", "greater than 0")),
        ("--npn_optimizer adagrad_norm --npn_wd 0.1", ("--npn_wd 0.1", "unit-length", "--npn_optimizer adagrad")),
    ],
)
def test_what_cannot_go_together_is_one_line_with_a_remedy(line: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="--npn_") as caught:
        resolved(f"--objective neuclip {line}")
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# The paper's tables, with 0 for ∞ (never) and the simultaneous runs without an inner loop.
RESTARTS = (0, 20, 100, 500, 2500, 12500)
UPDATES = (1, 2, 5, 10, 20, 50)
TRAININGS = (
    *(
        f"--npn_optimizer {optimizer} --npn_repetition {n}"
        for optimizer in ("adagrad_norm", "adagrad")
        for n in UPDATES
    ),
    "--npn_optimization simultaneous",
)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("inner", ["unified", "separate"])
@pytest.mark.parametrize("arch", ["--npn_arch prototypes --npn_num_protos 20", "--npn_arch mlp"])
def test_every_combination_of_the_ablations_runs(arch: str, inner: str, training: str, features: FeatureMaker) -> None:
    for restart in RESTARTS:
        objective = neuclip(
            f"--objective neuclip {arch} --npn_objective {inner} {training} --npn_restart_iter {restart}"
        )
        # At the beginning, where m > N fills up, and around a later restart.
        for step in (0, 1, 2, max(restart, 3) - 1, max(restart, 3)):
            objective.step = step
            images, texts = features(step, 8, dtype=torch.float32)
            output = objective(images, texts, torch.tensor(14.0))
            output.loss.backward()
            gradients = [images.grad, texts.grad, *(parameter.grad for parameter in objective.parameters())]
            assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
            assert all(torch.isfinite(value) for value in output.metrics.values())


@pytest.mark.parametrize("batch_size", [3, 6])
def test_recent_features_are_kept_only_where_a_global_batch_is_too_small(batch_size: int) -> None:
    """m = 10 against N = 6 and N = 12: the global batch counts, not that of a rank."""
    shape = RunShape(6, batch_size, 2, 10, 3)
    objective = make_objective("--objective neuclip --npn_num_protos 10", shape)
    assert isinstance(objective, NeuCLIP)
    assert isinstance(objective.normalizer, PrototypeNormalizer)
    assert objective.normalizer.recent.shape == (2, 10 if batch_size == 3 else 0, 6)


@pytest.mark.parametrize("schedule", ["cosine", "cosine_step"])
def test_gamma_0_is_the_printed_algorithm_whatever_the_schedule(schedule: str, features: FeatureMaker) -> None:
    """γ's schedules start at 1, so that a literal reading would mix for most of the run."""
    objectives = [
        neuclip(f"--objective neuclip --npn_num_protos 4 --gamma 0 --gamma_schedule {kind}")
        for kind in ("constant", schedule)
    ]
    for step in range(3):
        images, texts = (x.float() for x in features(step, 8))
        printed, scheduled = (objective(images, texts, torch.tensor(5.0)) for objective in objectives)
        assert torch.equal(printed.loss, scheduled.loss)
        assert float(scheduled.metrics["gamma"]) == 0.0


def test_gamma_not_0_starts_at_1_with_a_cosine() -> None:
    objective = neuclip("--objective neuclip")
    assert objective.gamma is not None
    assert objective.gamma.at(0, 0) == 1.0
    assert objective.gamma.at(1, 15) == pytest.approx(0.42 + 0.58 / 2)
    assert objective.gamma.at(2, 30) == pytest.approx(0.42)


def test_rho_reaches_the_reports_of_the_other_objectives(features: FeatureMaker) -> None:
    images, texts = (x.detach().float() for x in features(0, 8))
    values = []
    for rho in (0, 5):
        objective = make_objective(f"--objective openclip --rho {rho}", SHAPE)
        values.append(float(objective(images, texts, torch.tensor(10.0)).metrics["global_loss"]))
    assert values[1] - values[0] == pytest.approx(0.5, rel=1e-5)


class Sixth(Objective):
    """A throw-away method: the mean squared distance of matching pairs, times a weight of its own."""

    name = "sixth"
    summary = "a method for this test"
    synonyms = (frozenset({"sixth_published"}),)
    initial_temperature = 0.5

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    @classmethod
    def add_arguments(cls, group: _ArgumentGroup) -> None:
        group.add_argument("--sixth_weight", type=float, default=2.0)

    @classmethod
    def resolve_args(cls, args: Namespace) -> None:
        if args.sixth_weight < 0:
            raise ValueError(f"--sixth_weight {args.sixth_weight}: give 0 or more")

    @classmethod
    def from_args(cls, args: Namespace, shape: RunShape) -> Sixth:
        return cls(args.sixth_weight * shape.embed_dim)

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        return Output(self.weight * (image_features - text_features).square().sum(dim=1).mean())


@pytest.fixture
def sixth(monkeypatch: pytest.MonkeyPatch) -> type[Objective]:
    monkeypatch.setitem(OBJECTIVES, "sixth", Sixth)
    return Sixth


@pytest.mark.parametrize("line", ["--objective sixth", "--sixth_published", "--objective sixth --sixth_published"])
@pytest.mark.usefixtures("sixth")
def test_a_sixth_objective_is_selectable_and_has_its_flags(line: str, features: FeatureMaker) -> None:
    args = resolved(f"{line} --sixth_weight 3")
    assert args.objective == "sixth"
    objective = build_objective(args, SHAPE)
    assert isinstance(objective, Sixth)
    assert objective.weight == 18.0
    images, texts = features(0, 4)
    loss = objective(images, texts, torch.tensor(1.0)).loss
    torch.testing.assert_close(loss, 18.0 * (2 - 2 * (images * texts).sum(dim=1)).mean())
    assert objective.step == 1


@pytest.mark.usefixtures("sixth")
def test_a_sixth_objective_checks_its_flags_and_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--sixth_weight -1"):
        resolved("--objective sixth --sixth_weight -1")
    # Flags of a method that was not chosen are not checked: they have no effect.
    assert resolved("--objective openclip --sixth_weight -1").objective == "openclip"
    with pytest.raises(ValueError, match="--objective neuclip contradicts --sixth_published"):
        resolved("--objective neuclip --sixth_published")
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    for part in ("objective sixth", "a method for this test", "--sixth_weight", "--sixth_published"):
        assert part in shown


def test_the_sixth_objective_is_gone_afterwards() -> None:
    assert "sixth" not in OBJECTIVES
    with pytest.raises(SystemExit):
        parse("--sixth_published")


def test_step_and_epoch_are_counted() -> None:
    objective = make_objective("--objective openclip", SHAPE)
    same = torch.eye(4, 6)
    for epoch in range(2):
        objective.start_epoch(epoch)
        for _ in range(3):
            objective(same, same, torch.tensor(1.0))
    assert (objective.step, objective.epoch) == (6, 1)
    assert objective.state_dict()["_extra_state"] == {"step": 6, "epoch": 1}
