"""Parameters that an objective leaves to the outer optimizer: trained, scaled, saved, resumed like those of the towers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from end_to_end.runs import flat_tensors
from ranks import run_on_ranks
from small_training import CPU, make_args, make_batches, make_training
from training.atomic_files import write_atomically
from training.checkpoint import read_checkpoint
from training.distributed import World
from training.errors import UserError
from training.loop import Training, train_one_epoch

# m = 24 is more than the 8 samples of a batch: rows wait three steps until they are in use. T_r = 5 falls into an epoch.
PROTOTYPES = ("--npn_num_protos", "24", "--npn_restart_iter", "5")
MLP = ("--npn_arch", "mlp", "--npn_restart_iter", "5")
NETWORKS = {"prototypes": PROTOTYPES, "mlp": MLP, "separate": (*PROTOTYPES, "--npn_objective", "separate")}
TOGETHER = ("--objective", "neuclip", "--npn_optimization", "simultaneous", "--npn_wd", "0.1", "--epochs", "3")


def _training(network: str, *flags: str, world: World | None = None) -> Training:
    args = make_args(*TOGETHER, *NETWORKS[network], "--lr", "0.01", *flags)
    return make_training(args, make_batches(4, 8), world or World(0, 1, CPU))


def _own(training: Training) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in training.state.objective.named_parameters()}


@pytest.mark.parametrize("network", NETWORKS)
def test_they_are_a_group_of_their_own_and_learn(network: str) -> None:
    training = _training(network)
    (group,) = [group for group in training.state.optimizer.param_groups if group["role"] == "objective"]
    assert group["weight_decay"] == 0.1
    assert [id(p) for p in group["params"]] == [id(p) for p in training.state.objective.parameters()]
    train_one_epoch(training, 0)
    before = _own(training)
    train_one_epoch(training, 1)
    assert group["lr"] == pytest.approx(training.rates.model(7))
    for name, value in _own(training).items():
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("saved_after", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_resumed_run_continues_to_the_last_bit(network: str, saved_after: int, tmp_path: Path) -> None:
    whole = _training(network)
    for epoch in range(3):
        train_one_epoch(whole, epoch)
        whole.state.epoch = epoch + 1
        if epoch + 1 == saved_after:
            write_atomically(tmp_path / "saved.pt", whole.state.to_checkpoint("run", "small"))
    resumed = _training(network)
    resumed.state.load(read_checkpoint(tmp_path / "saved.pt"), tmp_path / "saved.pt", "small")
    for epoch in range(saved_after, 3):
        train_one_epoch(resumed, epoch)
        resumed.state.epoch = epoch + 1
    expected = flat_tensors(whole.state.to_checkpoint("run", "small"))
    found = flat_tensors(resumed.state.to_checkpoint("run", "small"))
    own = [place for place in expected if "objective" in place]
    assert len(own) > 1
    assert expected.keys() == found.keys()
    assert [place for place in expected if not torch.equal(found[place], expected[place])] == []


@pytest.mark.parametrize("network", NETWORKS)
def test_a_gradient_scaler_changes_nothing(network: str) -> None:
    """Their gradients arrive through backward, so that they are scaled and unscaled with all others."""
    runs = []
    for enabled in (False, True):
        training = _training(network)
        # A power of two: scaling and unscaling is exact.
        training.state.scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        train_one_epoch(training, 0)
        runs.append({**_own(training), **training.state.towers.state_dict()})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("network", NETWORKS)
def test_micro_batches_change_nothing(network: str) -> None:
    """The objective sees the whole batch once, so that its own gradient is added once, too."""
    runs = []
    for accum_freq in ("1", "2"):
        descent = ("--optimizer", "sgd", "--momentum", "0", "--lr", "0.1")
        training = _training(network, *descent, "--accum-freq", accum_freq)
        train_one_epoch(training, 0)
        runs.append(_own(training))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def train_every_network() -> list[dict[str, Tensor]]:
    """Two epochs of plain gradient descent; on as many ranks as there are."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU) if dist.is_initialized() else World(0, 1, CPU)
    found = []
    for network in NETWORKS:
        training = _training(network, "--optimizer", "sgd", "--momentum", "0", "--lr", "0.1", world=world)
        for epoch in range(2):
            train_one_epoch(training, epoch)
        found.append({**_own(training), **training.state.towers.state_dict()})
    return found


def test_updates_do_not_depend_on_the_number_of_ranks() -> None:
    alone = train_every_network()
    for rank in run_on_ranks(train_every_network, 2):
        for network, expected, found in zip(NETWORKS, alone, rank):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=2e-5, atol=5e-6, msg=f"{network}: {name}")


def test_a_checkpoint_of_alternating_optimization_is_refused(tmp_path: Path) -> None:
    alternating = make_training(make_args("--objective", "neuclip", *PROTOTYPES), make_batches(2, 8))
    write_atomically(tmp_path / "saved.pt", alternating.state.to_checkpoint("run", "small"))
    simultaneous = _training("prototypes")
    with pytest.raises(UserError, match="does not fit the present flags"):
        simultaneous.state.load(read_checkpoint(tmp_path / "saved.pt"), tmp_path / "saved.pt", "small")
