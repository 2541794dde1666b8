"""Saving, loading and continuing: the next step is the same to the last bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from neuclip import OBJECTIVES, Objective, RunShape, make_objective
from neuclip.normalizers import PrototypeNormalizer
from neuclip.objectives.amorlip import AmorLIP
from neuclip.objectives.neuclip import NeuCLIP
from neuclip.pairwise import gather_batch

from .conftest import FeatureMaker

N, DIM, STEPS_PER_EPOCH = 8, 6, 4

TOGETHER = "--objective neuclip --npn_optimization simultaneous"
RUNS = {name: f"--objective {name}" for name in OBJECTIVES} | {
    "fastclip v1": "--fastclip --temperature_scheme global_constant --gamma_schedule constant",
    "fastclip v2": "--fastclip --temperature_scheme individual_learnable --lr_tau 0.02",
    "fastclip v3": "--fastclip --multiply_tau",
    "neuclip, m<N": "--objective neuclip --npn_num_protos 5 --npn_restart_iter 3",
    "neuclip, m=N": "--objective neuclip --npn_num_protos 8 --npn_restart_iter 5 --gamma_schedule cosine",
    "neuclip, m>N": "--objective neuclip --npn_num_protos 20 --npn_restart_iter 5",
    "neuclip, long filling": "--objective neuclip --npn_num_protos 45 --npn_restart_iter 50",
    "neuclip, adagrad": "--objective neuclip --npn_num_protos 20 --npn_optimizer adagrad --npn_lr 0.1 --npn_wd 0.01",
    "neuclip, printed": "--objective neuclip --npn_num_protos 20 --npn_restart_iter 0 --gamma 0",
    "neuclip, separate": "--objective neuclip --npn_num_protos 20 --npn_restart_iter 3 --npn_objective separate",
    "neuclip, mlp": "--objective neuclip --npn_arch mlp --npn_repetition 2",
    "neuclip, mlp with restarts": "--objective neuclip --npn_arch mlp --npn_repetition 2 --npn_restart_iter 3",
    "neuclip, mlp, adagrad_norm": "--objective neuclip --npn_arch mlp --npn_optimizer adagrad_norm --npn_wd 0.1",
    "neuclip, simultaneous, m<N": f"{TOGETHER} --npn_num_protos 5 --npn_restart_iter 3",
    "neuclip, simultaneous, m>N": f"{TOGETHER} --npn_num_protos 20 --npn_restart_iter 5 --npn_objective separate",
    "neuclip, simultaneous, long filling": f"{TOGETHER} --npn_num_protos 45",
    "neuclip, simultaneous, mlp": f"{TOGETHER} --npn_arch mlp --npn_restart_iter 3",
    "amorlip, one network": "--objective amorlip --reinit_lambda_every_n_epochs 0 --update_ema_mlps_every_n_steps 1",
    "amorlip, average": "--objective amorlip --no-fit_w_prev --reinit_lambda_every_n_epochs 2 --lambda_fit_neg_only",
    "amorlip, js_div": "--objective amorlip --lambda_loss_type js_div --update_lambda_every_n_steps 2 --adaptive_tau",
}


def make(flags: str, batch_size: int = N) -> Objective:
    return make_objective(f"{flags} --data_size 1000", RunShape(DIM, batch_size, 1, STEPS_PER_EPOCH, 3))


def train(objective: Objective, steps: range, features: FeatureMaker, size: int = N) -> list[Tensor]:
    """Losses and gradients of some steps of a run; step s always sees the same batch.

    What the objective leaves to an outer optimizer goes down its gradient.
    """
    found = []
    own = list(objective.parameters())
    for step in steps:
        if step % STEPS_PER_EPOCH == 0:
            objective.start_epoch(step // STEPS_PER_EPOCH)
        images, texts = features(step, size, DIM, dtype=torch.float32)
        scale = torch.tensor(10.0 + step, requires_grad=True)
        bias = None if objective.initial_logit_bias is None else torch.tensor(-4.0)
        keys = torch.arange(size) + (step % 3) * size
        loss = objective(images, texts, scale, bias, keys).loss
        gradients = torch.autograd.grad(loss, (images, texts, scale, *own))
        found += [loss.detach(), *gradients]
        with torch.no_grad():
            for parameter, gradient in zip(own, gradients[3:]):
                parameter -= 0.1 * gradient
    return found


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


@pytest.mark.parametrize("saved_after", [1, 2, 5, 6])
@pytest.mark.parametrize("run", RUNS)
def test_a_loaded_objective_continues_to_the_last_bit(run: str, saved_after: int, features: FeatureMaker) -> None:
    original = make(RUNS[run])
    train(original, range(saved_after), features)
    saved = through_a_file(original.state_dict())
    loaded = make(RUNS[run])
    loaded.load_state_dict(saved)
    assert_same_state(loaded.state_dict(), saved)
    assert (loaded.step, loaded.epoch) == (saved_after, (saved_after - 1) // STEPS_PER_EPOCH)

    following = range(saved_after, saved_after + 4)
    for expected, value in zip(train(original, following, features), train(loaded, following, features)):
        assert torch.equal(expected, value)
    assert_same_state(loaded.state_dict(), original.state_dict())


@pytest.mark.parametrize("run", RUNS)
def test_loading_leaves_the_loaded_state_alone(run: str, features: FeatureMaker) -> None:
    """Two objectives from one checkpoint, or one that is loaded twice, share no memory with it."""
    original = make(RUNS[run])
    train(original, range(3), features)
    saved, untouched = through_a_file(original.state_dict()), through_a_file(original.state_dict())
    loaded = make(RUNS[run])
    loaded.load_state_dict(saved)
    train(loaded, range(3, 6), features)
    assert_same_state(saved, untouched)


def test_the_states_that_are_saved_cover_filling_and_full(features: FeatureMaker) -> None:
    """Guards the cases above: m > N is saved while it fills and when full."""
    filling = {}
    for run in ("neuclip, m>N", "neuclip, long filling"):
        for saved_after in (1, 2, 5, 6):
            objective = make(RUNS[run])
            train(objective, range(saved_after), features)
            assert isinstance(objective, NeuCLIP)
            assert isinstance(objective.normalizer, PrototypeNormalizer)
            filling[run, saved_after] = objective.normalizer.filling
    assert [filling["neuclip, m>N", saved_after] for saved_after in (1, 2, 5, 6)] == [True, True, False, False]
    assert [filling["neuclip, long filling", saved_after] for saved_after in (1, 2, 5, 6)] == [True, True, True, False]


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 16), (8, 32), (32, 8), (20, 8), (8, 20)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_another_global_batch_size_after_loading(before: int, after: int, steps: int, features: FeatureMaker) -> None:
    """m = 20: the memory of recent features appears, stays or vanishes, the prototypes stay."""
    flags = "--objective neuclip --npn_num_protos 20 --npn_restart_iter 6 --npn_repetition 2"
    original = make(flags, before)
    train(original, range(steps), features, before)
    saved = through_a_file(original.state_dict())
    loaded = make(flags, after)
    loaded.load_state_dict(saved)
    assert isinstance(original, NeuCLIP)
    assert isinstance(loaded, NeuCLIP)
    assert torch.equal(loaded.normalizer.prototypes, original.normalizer.prototypes)
    assert loaded.normalizer.active == original.normalizer.active == min(20, before * steps)
    assert loaded.step == steps

    accumulator = saved["normalizer.optimizer.accumulator"]
    assert torch.equal(loaded.normalizer.optimizer.accumulator, accumulator)
    for step in range(steps, 14):
        assert all(torch.isfinite(x).all() for x in train(loaded, range(step, step + 1), features, after))
        norms = loaded.normalizer.prototypes[:, : loaded.normalizer.active].norm(dim=2)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    # 14 steps are more than enough to have m samples again, and a restart at step 12.
    assert loaded.normalizer.active == 20


def test_another_batch_size_does_not_throw_fitted_prototypes_away(features: FeatureMaker) -> None:
    """Only a restart that is due replaces them, although the memory of recent features is empty after a change."""
    flags = "--objective neuclip --npn_num_protos 20 --npn_restart_iter 0 --npn_repetition 0"
    original = make(flags, 32)
    train(original, range(2), features, 32)
    loaded = make(flags, 8)
    loaded.load_state_dict(through_a_file(original.state_dict()))
    train(loaded, range(2, 5), features, 8)
    assert isinstance(original, NeuCLIP)
    assert isinstance(loaded, NeuCLIP)
    assert torch.equal(loaded.normalizer.prototypes, original.normalizer.prototypes)


@pytest.mark.parametrize("saved_after", [1, 4, 6])
def test_starting_an_epoch_again_changes_nothing(saved_after: int, features: FeatureMaker) -> None:
    """Whoever resumes within an epoch starts it once more; the networks are not to begin anew for that."""
    flags = "--objective amorlip --update_ema_mlps_every_n_steps 1"
    original = make(flags)
    train(original, range(saved_after), features)
    saved = through_a_file(original.state_dict())
    loaded = make(flags)
    loaded.load_state_dict(saved)
    loaded.start_epoch(original.epoch)
    assert_same_state(loaded.state_dict(), saved)
    assert isinstance(loaded, AmorLIP)
    assert not torch.equal(loaded.normalizer.current.weights, loaded.normalizer.average.weights)
    # The next epoch does begin anew, also where it was never seen before.
    following = original.epoch + 1
    for objective in (original, loaded):
        objective.start_epoch(following)
    assert_same_state(loaded.state_dict(), original.state_dict())
    assert torch.equal(loaded.normalizer.current.weights, loaded.normalizer.average.weights)
    assert torch.equal(loaded.normalizer.previous.weights, saved["normalizer.average.weights"])
    assert loaded.normalizer.optimizer.updates == 0
    assert not loaded.normalizer.optimizer.second_moment.any()


def test_networks_of_another_width_are_refused() -> None:
    saved = through_a_file(make("--objective amorlip").state_dict())
    with pytest.raises(RuntimeError, match="weights"):
        make("--objective amorlip --h_dim_factor 2").load_state_dict(saved)


def test_another_number_of_prototypes_is_refused(features: FeatureMaker) -> None:
    original = make("--objective neuclip --npn_num_protos 20")
    with pytest.raises(RuntimeError, match="prototypes"):
        make("--objective neuclip --npn_num_protos 21").load_state_dict(through_a_file(original.state_dict()))


def test_another_number_of_prototypes_changes_nothing_and_has_a_remedy(features: FeatureMaker) -> None:
    ours = make("--objective neuclip --npn_num_protos 6")
    train(ours, range(2), features)
    before = through_a_file(ours.state_dict())
    theirs = make("--objective neuclip --npn_num_protos 7")
    with pytest.raises(RuntimeError, match="it has 7 prototypes, not 6: give the --npn_num_protos") as caught:
        ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert "Missing" not in str(caught.value)
    assert torch.equal(ours.state_dict()["normalizer.prototypes"], before["normalizer.prototypes"])


@pytest.mark.parametrize(("ours", "theirs"), [("adagrad", "adagrad_norm"), ("adagrad_norm", "adagrad")])
def test_the_state_of_another_inner_optimizer_is_refused(ours: str, theirs: str) -> None:
    saved = through_a_file(make(f"--objective neuclip --npn_num_protos 6 --npn_optimizer {theirs}").state_dict())
    with pytest.raises(RuntimeError, match="accumulator"):
        make(f"--objective neuclip --npn_num_protos 6 --npn_optimizer {ours}").load_state_dict(saved)


def test_a_first_batch_smaller_than_announced_fills_what_it_can(features: FeatureMaker) -> None:
    objective = make("--objective neuclip --npn_num_protos 20 --npn_repetition 0 --gamma 0", 32)
    assert isinstance(objective, NeuCLIP)
    train(objective, range(1), features, 8)
    assert objective.normalizer.active == 8
    assert objective.normalizer.filling
    train(objective, range(1, 2), features, 32)
    assert objective.normalizer.active == 20
    assert (objective.normalizer.prototypes.norm(dim=2) > 0.9).all()


@pytest.mark.parametrize(("ours", "theirs"), [("mlp", "prototypes"), ("prototypes", "mlp")])
def test_another_architecture_is_refused(ours: str, theirs: str) -> None:
    saved = through_a_file(make(f"--objective neuclip --npn_arch {theirs}").state_dict())
    with pytest.raises(ValueError, match="--npn_arch"):
        make(f"--objective neuclip --npn_arch {ours}").load_state_dict(saved)


@pytest.mark.parametrize("optimization", ["alternating", "simultaneous"])
def test_an_mlp_restarts_from_other_weights_each_time_but_the_same_in_every_process(optimization: str) -> None:
    flags = f"--objective neuclip --npn_arch mlp --npn_optimization {optimization}"
    objectives = [make(flags), make(flags)]
    drawn = []
    for objective in objectives:
        assert isinstance(objective, NeuCLIP)
        torch.manual_seed(len(drawn))  # what else is random in a process has no part in it
        weights = []
        for _ in range(3):
            objective.normalizer.restart(gather_batch(torch.eye(N, DIM), torch.eye(N, DIM)))
            state = objective.normalizer.state_dict()
            weights.append(torch.cat([v.flatten() for k, v in state.items() if "mlp" in k]))
        drawn.append(weights)
    for first, second in zip(*drawn):
        assert torch.equal(first, second)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert not torch.allclose(drawn[0][first], drawn[0][second])


@pytest.mark.parametrize("m", [5, 20])
def test_rows_that_are_not_in_use_stay_zero_under_adamw(m: int, features: FeatureMaker) -> None:
    """Before m samples were seen the other rows have no gradient; weight decay and moments must not wake them up."""
    objective = make(f"{TOGETHER} --npn_num_protos {m} --npn_wd 0.1")
    assert isinstance(objective, NeuCLIP)
    prototypes = objective.normalizer.prototypes
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.1, weight_decay=objective.outer_weight_decay)
    for step in range(4):
        images, texts = features(step, N, DIM, dtype=torch.float32)
        objective(images, texts, torch.tensor(12.0)).loss.backward()
        in_use = min(m, (step + 1) * N)
        assert objective.normalizer.active == in_use
        assert prototypes.grad.abs().amax(dim=2)[:, :in_use].min() > 0
        assert not prototypes.grad[:, in_use:].any()
        before = prototypes.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert not prototypes[:, in_use:].any()
        assert torch.isfinite(prototypes).all()
        assert (prototypes - before)[:, :in_use].abs().amax(dim=2).min() > 0


@pytest.mark.parametrize("run", RUNS)
def test_state_follows_the_objective_to_another_precision(run: str, features: FeatureMaker) -> None:
    """A float32 checkpoint continues in a float64 objective: buffers are converted on loading, not replaced."""
    original = make(RUNS[run])
    train(original, range(3), features)
    loaded = make(RUNS[run]).double()
    loaded.load_state_dict(through_a_file(original.state_dict()))
    assert all(
        x.dtype == torch.float64
        for x in loaded.state_dict().values()
        if isinstance(x, Tensor) and x.is_floating_point()
    )
    images, texts = features(3, N, DIM)
    bias = None if loaded.initial_logit_bias is None else torch.tensor(-4.0, dtype=torch.float64)
    assert torch.isfinite(loaded(images, texts, torch.tensor(10.0, dtype=torch.float64), bias, torch.arange(N)).loss)
