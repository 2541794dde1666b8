"""--loss-chunk-size changes what a loss needs in memory, and nothing else: every registered objective, chunked and not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuclip import OBJECTIVES, Objective, RunShape, make_objective

from .conftest import FeatureMaker

N, DIM, STEPS, STEPS_PER_EPOCH = 8, 6, 3, 2
ROUNDING = {"rtol": 1e-11, "atol": 1e-13}

RUNS = {name: f"--objective {name}" for name in OBJECTIVES} | {
    "neuclip, m<N": "--objective neuclip --npn_num_protos 5 --npn_restart_iter 2",
    "neuclip, m>N": "--objective neuclip --npn_num_protos 20",
    "openclip, local loss": "--objective openclip --local-loss",
}


def bias_for(objective: Objective, dtype: torch.dtype) -> list[Tensor]:
    """The logit_bias of an objective that has one."""
    if objective.initial_logit_bias is None:
        return []
    return [torch.tensor(-3.0, dtype=dtype, requires_grad=True)]


def train(flags: str, features: FeatureMaker) -> Iterator[tuple[str, Any]]:
    """Everything that a few steps in float64 yield, by name: losses, gradients, metrics, and the state at the end."""
    objective = make_objective(f"{flags} --data_size 100", RunShape(DIM, N, 1, STEPS_PER_EPOCH, 2)).double()
    for step in range(STEPS):
        if step % STEPS_PER_EPOCH == 0:
            objective.start_epoch(step // STEPS_PER_EPOCH)
        images, texts = features(step, N, DIM)
        scale = torch.tensor(14.0 + step, dtype=torch.float64, requires_grad=True)
        bias = bias_for(objective, torch.float64)
        keys = torch.arange(N) + (step % 2) * N
        output = objective(images, texts, scale, *(bias or [None]), keys)
        yield f"loss {step}", output.loss.detach()
        learnt = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        yield f"gradients {step}", torch.autograd.grad(output.loss, (images, texts, scale, *bias, *learnt))
        yield f"metrics {step}", output.metrics
    yield "state", objective.state_dict()


@pytest.mark.parametrize("chunk", [1, 3, N, N + 5])
@pytest.mark.parametrize("run", RUNS)
def test_chunks_change_no_value_and_no_gradient(run: str, chunk: int, features: FeatureMaker) -> None:
    whole = dict(train(RUNS[run], features))
    chunked = dict(train(f"{RUNS[run]} --loss-chunk-size {chunk}", features))
    assert len(whole) == 3 * STEPS + 1
    for name, expected in whole.items():
        assert_equal(chunked[name], expected, name)


def assert_equal(value: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(value, expected, msg=lambda text: f"{where}: {text}", **ROUNDING)
    elif isinstance(expected, dict):
        assert value.keys() == expected.keys(), where
        for key in expected:
            assert_equal(value[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, tuple | list):
        assert len(value) == len(expected), where
        for position, part in enumerate(expected):
            assert_equal(value[position], part, f"{where}, {position}")
    else:
        assert value == expected, where


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_flag_reaches_the_objective(name: str) -> None:
    objective = make_objective(f"--objective {name} --data_size 10 --loss-chunk-size 3", RunShape(DIM, N, 1, 10, 2))
    assert objective.chunk_rows == 3


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return, until nothing holds them any longer.

    Attributes:
        now, peak: bytes alive now, and the most that ever were. What came in from outside does not count; what an operator
            frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._tensors((args, kwargs)):
            self._watch(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            self._watch(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        identity = storage._cdata
        if identity not in self._known:
            self._known.add(identity)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, identity, size)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.now -= size


CHUNK, WIDTH = 64, 16
FLOAT32 = 4

Loss = Callable[[Tensor, Tensor], Tensor]


def peak_bytes(loss: Loss, size: int, features: FeatureMaker) -> int:
    """The most bytes alive during two steps, forward and backward, above the features."""
    batches = [features(step, size, WIDTH, dtype=torch.float32) for step in range(2)]
    with LiveBytes() as live:
        for images, texts in batches:
            loss(images, texts).backward()
    return live.peak


def loss_of(flags: str, size: int) -> Loss:
    """An objective's loss between logging steps. Prototypes are few: here it is the pairs that count."""
    objective = make_objective(f"{flags} --npn_num_protos 64 --data_size {size}", RunShape(WIDTH, size, 1, 10, 2))
    objective.report = False
    objective.start_epoch(0)

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        scale = torch.tensor(12.0, requires_grad=True)
        bias = bias_for(objective, torch.float32)
        return objective(images, texts, scale, *(bias or [None]), torch.arange(size)).loss

    return loss


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_memory_of_a_chunked_loss_is_linear_in_the_batch(name: str, features: FeatureMaker) -> None:
    """One block of all pairs is 16 chunks at N = 1024. Whoever keeps it for backward, or forms it once, is above that."""
    flags = f"--objective {name} --loss-chunk-size {CHUNK}"
    small, large = (peak_bytes(loss_of(flags, size), size, features) for size in (1024, 2048))
    assert CHUNK * 1024 * FLOAT32 < small < 1024 * 1024 * FLOAT32
    assert large < 2.5 * small


def keeps_its_chunks(images: Tensor, texts: Tensor) -> Tensor:
    """Chunked in the forward pass, but autograd keeps every chunk."""
    parts = [-F.logsigmoid(rows @ texts.T).sum() for rows in images.split(CHUNK)]
    return torch.stack(parts).sum()


def forms_all_pairs_once(images: Tensor, texts: Tensor) -> Tensor:
    return images.sum() + (images.detach() @ texts.detach().T).amax()


@pytest.mark.parametrize("loss", [keeps_its_chunks, forms_all_pairs_once])
def test_the_measure_notices_blocks_of_all_pairs(loss: Loss, features: FeatureMaker) -> None:
    small, large = (peak_bytes(loss, size, features) for size in (1024, 2048))
    assert small >= 1024 * 1024 * FLOAT32
    assert large > 3.5 * small


def test_the_measure_forgets_what_is_gone() -> None:
    outside = torch.ones(1000)
    with LiveBytes() as live:
        for _ in range(5):
            twice = outside * 2
            view = twice[10:]
            del twice
            assert live.now == 4000
            del view
            assert live.now == 0
        outside.add_(1.0).view(10, 100)
    assert (live.now, live.peak) == (0, 4000)
