"""What is not finite is found, not applied, and told with step, rank, τ, α and keys."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from host_reads import no_host_synchronisation
from neuclip.objectives import OBJECTIVES
from ranks import run_on_ranks
from small_training import CPU, make_args, make_batches, make_training
from training.data import Batch
from training.distributed import World
from training.finite import Finding, NonFiniteLog, culprits, describe
from training.loop import Training, training_step

FLAGS = ("--npn_num_protos", "6", "--grad-clip-norm", "1")


def learnt(training: Training) -> dict[str, Tensor]:
    """Weights and the optimizer's moments and step counts."""
    found = {f"towers.{name}": value.detach().clone() for name, value in training.state.towers.state_dict().items()}
    for number, moments in training.state.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value.clone() for name, value in moments.items() if isinstance(value, Tensor)}
    return found


def broken(batch: Batch, part: str = "image") -> Batch:
    image = batch.image.clone()
    image[1, 0, 0, 0] = math.nan if part == "image" else math.inf
    return batch._replace(image=image)


@pytest.mark.parametrize("clipping", [(), ("--grad-clip-norm", "1")], ids=["plain", "clipped"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "lion"])
@pytest.mark.parametrize("accum_freq", ["1", "2"])
def test_update_is_left_out(optimizer: str, accum_freq: str, clipping: tuple[str, ...]) -> None:
    batches = make_batches(3, 4)
    args = make_args("--optimizer", optimizer, "--accum-freq", accum_freq, *clipping)
    training = make_training(args, batches)
    training_step(training, batches[0])
    before = learnt(training)
    training_step(training, broken(batches[1]))
    after = learnt(training)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    # And the next one is applied.
    training_step(training, batches[2])
    assert not torch.equal(learnt(training)["towers.model.visual.weight"], before["towers.model.visual.weight"])
    assert [finding.what for finding in training.guard.findings(wait=True)] == ["features"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "lion"])
def test_a_first_update_that_is_left_out_leaves_no_garbage(optimizer: str) -> None:
    """Moments are made in the first update, and must be made even if that is not applied."""
    batches = make_batches(2, 4)
    args = make_args("--optimizer", optimizer, "--wd", "0")
    spoilt, plain = make_training(args, batches), make_training(args, batches)
    # Memory that is taken as it comes is not 0 then.
    filler = [torch.full((100, 100), 1e30) for _ in range(50)]
    del filler
    training_step(spoilt, broken(batches[0]))
    training_step(spoilt, batches[1])
    training_step(plain, batches[1])
    for name, value in plain.state.towers.state_dict().items():
        torch.testing.assert_close(spoilt.state.towers.state_dict()[name], value, msg=name)


def test_parameters_that_are_not_clipped_are_looked_at_too() -> None:
    batches = make_batches(2, 4)
    flags = ("--objective", "neuclip", "--npn_optimization", "simultaneous", "--npn_num_protos", "4")
    training = make_training(make_args(*flags, "--grad-clip-norm", "1"), batches)
    training_step(training, batches[0])
    (parameter, *_) = training.state.optimizer.param_groups[-1]["params"]
    assert training.state.optimizer.param_groups[-1]["role"] == "objective"
    handle = parameter.register_hook(lambda gradient: gradient * math.nan)
    before = parameter.detach().clone()
    training_step(training, batches[1])
    handle.remove()
    assert torch.equal(parameter, before)
    assert [finding.what for finding in training.guard.findings(wait=True)] == ["gradient"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_tells_its_normalizers_and_keys(name: str) -> None:
    batches = make_batches(2, 4)
    training = make_training(make_args("--objective", name, *FLAGS), batches)
    training.state.objective.report = False
    training_step(training, batches[0])
    training.state.step = 7
    training_step(training, broken(batches[1]))
    (finding,) = training.guard.findings(wait=True)
    assert (finding.step, finding.rank, finding.keys) == (8, 0, [4, 5, 6, 7])
    assert finding.temperature == pytest.approx(math.exp(-2.0), rel=0.1)
    has_normalizers = name not in ("openclip", "siglip")
    assert (finding.log_normalizers is not None) == has_normalizers
    assert training.guard.in_a_row == 1
    training_step(training, batches[0])
    assert training.guard.findings(wait=True) == []
    assert training.guard.in_a_row == 0


def test_healthy_run_has_no_finding() -> None:
    batches = make_batches(5, 4)
    training = make_training(make_args(*FLAGS), batches)
    for batch in batches:
        training_step(training, batch)
    assert training.guard.findings(wait=True) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("which", [0, -1])
def test_one_element_of_one_gradient_is_enough(which: int, value: float) -> None:
    """Also where the sum of all, or of their squares, would overflow though each is finite."""
    (batch,) = make_batches(1, 4)
    training = make_training(make_args(*FLAGS[:2]), [batch])
    parameter = training.state.optimizer.param_groups[0]["params"][which]
    before = parameter.detach().clone()

    def spoil(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[-2:] = value
        return spoilt

    handle = parameter.register_hook(spoil)
    training_step(training, batch)
    handle.remove()
    assert (
        [finding.what for finding in training.guard.findings(wait=True)] == [] if math.isfinite(value) else ["gradient"]
    )
    assert torch.equal(parameter, before) != math.isfinite(value)


def test_infinite_gradient_of_a_finite_loss_is_found() -> None:
    batches = make_batches(2, 4)
    training = make_training(make_args(), batches)
    parameter = training.state.towers.model.visual.weight
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    before = learnt(training)
    training_step(training, batches[0])
    handle.remove()
    assert torch.equal(before["towers.model.norm.weight"], learnt(training)["towers.model.norm.weight"])
    (finding,) = training.guard.findings(wait=True)
    assert finding.what == "gradient"
    assert math.isfinite(finding.loss)


def test_infinite_loss_with_a_finite_gradient_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(1, 4)
    training = make_training(make_args(), batches)
    forward = training.state.objective.forward

    def shifted(*inputs: Any) -> Any:
        output = forward(*inputs)
        output.loss = output.loss + math.inf
        return output

    monkeypatch.setattr(training.state.objective, "forward", shifted)
    before = learnt(training)
    training_step(training, batches[0])
    assert torch.equal(before["towers.model.visual.weight"], learnt(training)["towers.model.visual.weight"])
    assert [finding.what for finding in training.guard.findings(wait=True)] == ["loss"]


def test_nothing_waits_for_the_device() -> None:
    batches = make_batches(2, 4)
    training = make_training(make_args("--grad-clip-norm", "1"), batches)
    training.state.objective.report = False
    for batch in (batches[0], broken(batches[1])):
        with no_host_synchronisation():
            training_step(training, batch)


def one_rank_is_broken() -> tuple[list[Finding], dict[str, Tensor], dict[str, Tensor]]:
    """What a rank finds when rank 1's pictures are broken; weights before and after."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU)
    batches = make_batches(2, 8)
    training = make_training(make_args("--npn_num_protos", "6", "--objective", "neuclip"), batches, world)
    shares = [Batch(*(part[world.rank * 4 : world.rank * 4 + 4] for part in batch)) for batch in batches]
    training_step(training, shares[0])
    before = learnt(training)
    training_step(training, broken(shares[1]) if world.rank == 1 else shares[1])
    return training.guard.findings(wait=True), before, learnt(training)


def test_one_rank_stops_the_update_of_all_and_is_named() -> None:
    ranks = run_on_ranks(one_rank_is_broken, 2)
    for _, before, after in ranks:
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
    everyone = [finding for findings, _, _ in ranks for finding in findings]
    (guilty,) = culprits(everyone)
    assert guilty.rank == 1
    assert guilty.keys == [12, 13, 14, 15]
    assert describe(everyone).startswith("step 1: features not finite on rank 1, loss nan, τ ")


def test_description_names_everything() -> None:
    finding = Finding(1041, 3, "loss", math.inf, 0.03, (-2.0, 19.5), list(range(40)))
    assert describe([finding]) == (
        "step 1041: loss not finite on rank 3, loss inf, τ 0.03, α -2 to 19.5, keys 0, 1, 2, 3, 4, 5, 6, 7, …"
    )
    bare = Finding(2, 0, "gradient", 1.5, 0.07, None, None)
    assert describe([bare]) == "step 2: gradient not finite on rank 0, loss 1.5, τ 0.07, no α, no keys"


def test_log_is_bounded_and_the_file_has_all_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = NonFiniteLog(tmp_path / "nonfinite.jsonl")
    with caplog.at_level(logging.WARNING):
        for step in range(1500):
            log.add([Finding(step, 0, "loss", math.nan, 0.07, None, [step])])
    assert len(caplog.records) == 11  # 1, 2, 4 … 1024
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert len(lines) == 1000
    assert lines[3]["keys"] == [3]
    assert lines[3]["loss"] == "nan"


def test_unwritable_file_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = NonFiniteLog(tmp_path / "absent" / "nonfinite.jsonl")
    log.add([Finding(0, 0, "loss", math.nan, 0.07, None, None)])
    assert "cannot be written" in caplog.text
