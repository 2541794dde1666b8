"""The inner loop as a recording: no GPU here, so a recorder for the CPU keeps what a CUDA graph keeps and nothing else.

It writes down the operators that a program calls, with the very tensors it called them on. A replay calls them again on
those: whatever the host decided while recording, a number or an address, is frozen, as in a CUDA graph.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuclip import RunShape, make_objective
from neuclip.normalizers import release_recordings
from neuclip.normalizers.inner_loop import InnerLoop, Program
from neuclip.objectives.neuclip import NeuCLIP

from .conftest import FeatureMaker

N, DIM = 8, 6


class Tape(TorchDispatchMode):
    """Operators with their arguments and results, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder:
    """Records on the CPU and counts; what it runs while recording is undone, since a CUDA graph does not run it."""

    def __init__(self, *changed: Tensor) -> None:
        self.changed = changed
        self.recorded = 0
        self.replayed = 0

    def __call__(self, program: Program) -> Program:
        before = [tensor.clone() for tensor in self.changed]
        tape = Tape()
        with tape:
            program()
        for tensor, value in zip(self.changed, before):
            tensor.copy_(value)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InnerLoop, "_records", lambda loop, _: loop.enabled)


def make(flags: str, recorder: Recorder | None) -> NeuCLIP:
    objective = make_objective(f"--objective neuclip --npn_repetition 3 {flags}", RunShape(DIM, N, 1, 5, 4))
    assert isinstance(objective, NeuCLIP)
    loop = objective.normalizer.loop
    if recorder is None:
        loop.enabled = False
    else:
        loop.recorder = recorder
        recorder.changed = (objective.normalizer.prototypes, objective.normalizer.optimizer.accumulator)
    return objective


def train(objective: NeuCLIP, features: FeatureMaker, steps: range) -> list[Tensor]:
    """Losses and feature gradients; the temperature changes and γ mixes, as in training."""
    found = []
    for step in steps:
        images, texts = features(step, N, DIM, dtype=torch.float32)
        loss = objective(images, texts, torch.tensor(9.0 + step)).loss
        found += [loss.detach(), *torch.autograd.grad(loss, (images, texts))]
    return found


RUNS = {
    # flags: steps without a recording among ten (the first of each kind), recordings
    "--npn_num_protos 5 --npn_restart_iter 3": (1, 1),
    "--npn_num_protos 5 --npn_optimizer adagrad --npn_lr 0.1 --npn_wd 0.1": (1, 1),
    "--npn_num_protos 5 --npn_objective separate --fastclip_eps 0": (1, 1),
    "--npn_num_protos 5 --npn_precision bf16": (1, 1),
    "--npn_num_protos 5 --loss-chunk-size 3": (1, 1),
    # 8, 16, 20 prototypes in use: three kinds, of which the last one stays.
    "--npn_num_protos 20 --npn_restart_iter 4": (3, 1),
}


@pytest.mark.parametrize("flags", RUNS)
def test_a_recorded_loop_is_the_loop_to_the_last_bit(flags: str, features: FeatureMaker) -> None:
    recorder = Recorder()
    plain, recorded = make(flags, None), make(flags, recorder)
    steps = range(10)
    for expected, value in zip(train(plain, features, steps), train(recorded, features, steps), strict=True):
        assert torch.equal(value, expected)
    without, recordings = RUNS[flags]
    assert recorder.recorded == recordings
    # One more replay is the trial.
    assert recorder.replayed == 3 * (len(steps) - without) + recordings
    for name, value in plain.state_dict().items():
        assert torch.equal(recorded.state_dict()[name], value) if isinstance(value, Tensor) else True


def test_a_tensor_that_moved_is_recorded_anew(features: FeatureMaker) -> None:
    """After .double(), say, the recording's addresses are those of nobody."""
    recorder = Recorder()
    plain, recorded = make("--npn_num_protos 5", None), make("--npn_num_protos 5", recorder)
    for objective in (plain, recorded):
        train(objective, features, range(3))
        objective.double()
    recorder.changed = (recorded.normalizer.prototypes, recorded.normalizer.optimizer.accumulator)
    assert recorder.recorded == 1
    for expected, value in zip(train(plain, features, range(3, 7)), train(recorded, features, range(3, 7))):
        assert torch.equal(value, expected)
    assert recorder.recorded == 2


def test_loading_a_checkpoint_keeps_the_recording_good(features: FeatureMaker) -> None:
    recorder = Recorder()
    other, recorded = make("--npn_num_protos 5", None), make("--npn_num_protos 5", recorder)
    train(other, features, range(4))
    train(recorded, features, range(10, 13))
    recorded.load_state_dict(other.state_dict())
    for expected, value in zip(train(other, features, range(4, 7)), train(recorded, features, range(4, 7))):
        assert torch.equal(value, expected)
    assert recorder.recorded == 1


def test_a_device_that_cannot_record_goes_on_without(features: FeatureMaker, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(program: Program) -> Program:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, refused = make("--npn_num_protos 5", None), make("--npn_num_protos 5", Recorder())
    refused.normalizer.loop.recorder = refuse
    found = train(refused, features, range(4))
    (message,) = caplog.messages
    assert "not recorded as a CUDA graph: operation not permitted" in message
    for expected, value in zip(train(plain, features, range(4)), found, strict=True):
        assert torch.equal(value, expected)


def test_other_constants_make_another_recording() -> None:
    """What the host computes with, say the logarithm of the number of prototypes, is frozen in a recording."""
    total = torch.zeros(1)
    loop = InnerLoop(recorder=Recorder(total))
    for factor, runs in ((2.0, 3), (5.0, 3)):
        for _ in range(runs):
            loop.run(lambda x, f=factor: total.add_(f * x), (torch.ones(1),), (total,), factor, times=1)
    assert float(total) == 3 * 2.0 + 3 * 5.0


def test_a_recording_that_fails_half_way_leaves_no_trace(features: FeatureMaker) -> None:
    """What the program did until then was recorded and not done."""

    class HalfWay(Recorder):
        def __call__(self, program: Program) -> Program:
            super().__call__(program)
            raise RuntimeError("out of memory")

    plain, refused = make("--npn_num_protos 5", None), make("--npn_num_protos 5", HalfWay())
    for expected, value in zip(train(plain, features, range(4)), train(refused, features, range(4)), strict=True):
        assert torch.equal(value, expected)
    assert not refused.normalizer.loop.enabled


@pytest.mark.parametrize("replay", [lambda program: None, lambda program: (program(), program())])
def test_a_recording_that_does_something_else_is_found_out(
    replay: Any, features: FeatureMaker, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing at all, say, where work went to another stream than the one that is recorded."""
    plain, recorded = make("--npn_num_protos 5", None), make("--npn_num_protos 5", Recorder())
    recorded.normalizer.loop.recorder = lambda program: lambda: replay(program)
    for expected, value in zip(train(plain, features, range(4)), train(recorded, features, range(4)), strict=True):
        assert torch.equal(value, expected)
    (message,) = caplog.messages
    assert "a replay did something else than the update" in message
    assert not recorded.normalizer.loop.enabled


def test_released_recordings_are_made_anew(features: FeatureMaker) -> None:
    recorder = Recorder()
    plain, recorded = make("--npn_num_protos 5", None), make("--npn_num_protos 5", recorder)
    found = train(recorded, features, range(3))
    release_recordings()
    assert recorded.normalizer.loop._recording is None
    assert recorded.normalizer.loop._static == ()
    found += train(recorded, features, range(3, 6))
    for expected, value in zip(train(plain, features, range(6)), found, strict=True):
        assert torch.equal(value, expected)
    assert recorder.recorded == 2


def test_a_copy_begins_without_a_recording(features: FeatureMaker) -> None:
    """A CUDA graph can be neither copied nor pickled, and it writes to the original."""
    recorder = Recorder()
    original = make("--npn_num_protos 5", recorder)
    train(original, features, range(3))
    original.normalizer.loop.recorder = None  # not to be copied along with what it counts
    other = copy.deepcopy(original)
    other.normalizer.loop.enabled = False
    for expected, value in zip(train(other, features, range(3, 5)), train(original, features, range(3, 5))):
        assert torch.equal(value, expected)
    assert other.normalizer.loop._recording is None
    assert recorder.recorded == 1


def test_the_switch() -> None:
    shape = RunShape(DIM, N, 1, 5, 4)
    assert make_objective("--objective neuclip", shape).normalizer.loop.enabled
    assert not make_objective("--objective neuclip --no-npn_cuda_graph", shape).normalizer.loop.enabled
