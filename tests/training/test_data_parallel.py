"""Gradients averaged over two ranks: with a static graph, in bfloat16, and in micro-batches."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ranks import run_on_ranks
from small_training import ALONE, CPU, SmallModel, make_args, make_batches, make_training
from training.data_parallel import distribute
from training.distributed import World
from training.loop import train_one_epoch, training_step
from training.model import TwoTowers

RANKS = 2
# bfloat16 rounds to 8 bits: each rank's gradient once, their sum once. The ranks' gradients may be larger than their mean.
ROUNDING = 2.0**-6


class Convolutional(SmallModel):
    """An image tower with weights that lie channels-last, as convolution towers have them."""

    def __init__(self, logit_bias: float | None = None) -> None:
        super().__init__(logit_bias)
        generator = torch.Generator().manual_seed(1)
        self.convolution = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for parameter in self.convolution.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return super().encode_image(self.convolution(image.contiguous(memory_format=torch.channels_last)), normalize)


def _epoch(args: Namespace, world: World) -> dict[str, list[Tensor]]:
    """Gradients of every parameter before each update."""
    training = make_training(args, make_batches(3, 8), world, model_class=Convolutional)
    found: dict[str, list[Tensor]] = {}

    def keep(*_: object) -> None:
        for name, parameter in training.state.towers.named_parameters():
            assert parameter.grad.stride() == parameter.stride(), name  # what a fused optimizer relies on
            found.setdefault(name, []).append(parameter.grad.detach().clone())

    training.state.optimizer.register_step_pre_hook(keep)
    train_one_epoch(training, 0)
    return found


def _on_two_ranks(args: Namespace) -> dict[str, list[Tensor]]:
    return _epoch(args, World(torch.distributed.get_rank(), RANKS, CPU))


# A step size of nearly nothing, so that all runs have the same parameters at each step.
FLAGS = ("--objective", "openclip", "--epochs", "1", "--lr", "1e-12")


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Tensor]]:
    return run_on_ranks(_on_two_ranks, RANKS, make_args(*FLAGS))[0]


def _assert_close(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], share: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradients in expected.items():
        for one, other in zip(found[name], gradients, strict=True):
            assert (one - other).abs().max() <= share * other.abs().max(), f"{name}: {one} for {other}"


def test_two_ranks_have_the_gradient_of_one(plain: dict[str, list[Tensor]]) -> None:
    _assert_close(plain, _epoch(make_args(*FLAGS), ALONE), 1e-5)


def test_a_static_graph_changes_no_gradient(plain: dict[str, list[Tensor]]) -> None:
    found = run_on_ranks(_on_two_ranks, RANKS, make_args(*FLAGS, "--ddp-static-graph"))
    for one in found:
        _assert_close(one, plain, 1e-6)


@pytest.mark.parametrize("accumulation", [(), ("--accum-freq", "2")], ids=["whole", "accum"])
def test_compressed_gradients_are_those_rounded_to_bfloat16(
    plain: dict[str, list[Tensor]], accumulation: tuple[str, ...]
) -> None:
    found = run_on_ranks(_on_two_ranks, RANKS, make_args(*FLAGS, *accumulation, "--grad-compression", "bf16"))
    _assert_close(found[0], plain, ROUNDING)
    differing = 0
    for name, gradients in found[0].items():
        for one, other, reference in zip(gradients, found[1][name], plain[name], strict=True):
            assert torch.equal(one, other), name
            assert one.dtype == torch.float32
            assert torch.equal(one, one.bfloat16().float()), f"{name} did not travel in bfloat16"
            differing += not torch.equal(one, reference)
    assert differing > 0


def test_one_rank_has_nobody_to_talk_to() -> None:
    towers = TwoTowers(SmallModel())
    assert distribute(towers, ALONE, static_graph=True, compression="bf16") is towers


STEPS = ("--objective", "openclip", "--epochs", "1", "--lr", "1e-2")


def _goes_on(settles: bool) -> list[Tensor]:
    """By how much weights differ after two steps in one process, and in two of which each begins with fresh buckets."""
    world = World(torch.distributed.get_rank(), 3, CPU)
    batches = make_batches(2, 12)

    def run(states: Sequence[dict], first: int) -> list[Sequence[dict]]:
        """States after each step from the `first` on."""
        training = make_training(make_args(*STEPS), batches, world, model_class=Convolutional)
        training.has_settled = not settles
        parts = (training.state.towers, training.state.optimizer)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
        after = []
        before = torch.get_rng_state()
        for batch in list(training.loader.epoch(0))[first:]:
            training.settle(batch)
            assert torch.equal(torch.get_rng_state(), before)
            assert all(parameter.grad is None for parameter in training.state.towers.parameters())
            training_step(training, batch)
            after.append(copy.deepcopy([part.state_dict() for part in parts]))
        return after

    middle, whole = run((), 0)
    (resumed,) = run(middle, 1)
    return [(value - resumed[0][name]).abs().max() for name, value in whole[0].items()]


@pytest.mark.parametrize("settles", [True, False])
def test_three_ranks_round_alike_from_the_first_step_on(settles: bool) -> None:
    for differences in run_on_ranks(_goes_on, 3, settles):
        # Without it they do differ, or this would test nothing.
        assert any(difference > 0 for difference in differences) != settles
