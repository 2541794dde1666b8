"""Repeats an update of few large operations, without the host between them where the device allows it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neuclip import distributed

Program = Callable[[], None]

_loops: weakref.WeakSet[InnerLoop] = weakref.WeakSet()


def release_recordings() -> None:
    """Forget every recording; to be called before a process group is destroyed, since NCCL waits until no graph uses it."""
    for loop in list(_loops):
        loop.release()


def record_cuda_graph(program: Program) -> Program:
    """Record what a program does on the GPU, without doing it; the result does it, at one launch from the host."""
    graph = torch.cuda.CUDAGraph()
    # A recording that fails may leave its own stream behind as the current one. Other threads may call CUDA meanwhile: the
    # loader's pins memory, NCCL's asks for events.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        program()
    return graph.replay


class InnerLoop:
    """Calls an update that changes tensors in place a number of times on the same inputs.

    On a GPU, and where ranks talk through NCCL, the update is recorded as a CUDA graph and replayed: an update is some
    forty kernels, most of them small, and two messages, which the host launches more slowly than the GPU runs them. The first
    run of each kind goes without, because libraries and communicators set themselves up in it. A recording is used if one
    replay does what the update does. It keeps the memory of its intermediate results and of a copy of its inputs.

    Args:
        enabled: whether to record at all.
        recorder: turns a program into its recording.
    """

    def __init__(self, enabled: bool = True, recorder: Callable[[Program], Program] = record_cuda_graph) -> None:
        self.enabled = enabled
        self.recorder = recorder
        self.release()
        _loops.add(self)

    def release(self) -> None:
        """Forget the recording and its memory; the next run of the same kind is a first one."""
        self._kind: Hashable = None
        self._static: tuple[Tensor, ...] = ()
        self._recording: Program | None = None

    def run(
        self,
        update: Callable[..., None],
        inputs: tuple[Tensor, ...],
        changed: tuple[Tensor, ...],
        constants: Hashable,
        times: int,
    ) -> None:
        """Call `update(*inputs)` `times` times. All ranks call it, and with the same constants and times.

        Args:
            inputs: what it reads; they may be other tensors, and have other contents, in every run.
            changed: what it reads and changes in place.
            constants: whatever else it depends on. A recording holds for the same constants only.
        """
        if times == 0:
            return
        program = self._recording_for(update, inputs, changed, constants) if self._records(inputs[0]) else None
        if program is None:
            for _ in range(times):
                update(*inputs)
            return
        for static, x in zip(self._static, inputs):
            static.copy_(x)
        for _ in range(times):
            program()

    def _recording_for(
        self, update: Callable[..., None], inputs: tuple[Tensor, ...], changed: tuple[Tensor, ...], constants: Hashable
    ) -> Program | None:
        """The recording; None in the first run of a kind, and where it cannot be had."""
        # A recording holds addresses: it is of no use once one of the tensors has moved.
        kind = (
            constants,
            *((x.shape, x.stride(), x.dtype, x.device) for x in inputs),
            *((x.data_ptr(), x.shape, x.dtype) for x in changed),
        )
        if kind != self._kind:
            self.release()
            self._kind = kind
        elif self._recording is None:
            self._record(update, inputs, changed)
        return self._recording

    def _record(self, update: Callable[..., None], inputs: tuple[Tensor, ...], changed: tuple[Tensor, ...]) -> None:
        """Record and try the recording out; if anything is wrong with it on any rank, no rank uses one."""
        problem = ""
        self._static = tuple(x.clone() for x in inputs)
        try:
            self._recording = self.recorder(lambda: update(*self._static))
        except RuntimeError as error:
            problem = str(error)
        # A message is either recorded on all ranks or on none.
        agreed = distributed.all_agree(self._recording is not None, inputs[0].device)
        if agreed and not self._does_the_same(update, inputs, changed):
            problem = "a replay did something else than the update"
        if agreed and distributed.all_agree(not problem, inputs[0].device):
            return
        # A graph saves launches and nothing else: no reason to end a run.
        self.enabled = False
        self.release()
        if problem or distributed.rank() == 0:
            reason = problem or "it failed on another rank"
            logging.warning("the NPN's updates are not recorded as a CUDA graph: %s", reason)

    def _does_the_same(
        self, update: Callable[..., None], inputs: tuple[Tensor, ...], changed: tuple[Tensor, ...]
    ) -> bool:
        """Whether a replay changes what the update changes, to rounding; `changed` is left as it was."""
        assert self._recording is not None
        before = [x.clone() for x in changed]
        results = []
        for program in (lambda: update(*inputs), self._recording):
            program()
            results.append([x.clone() for x in changed])
            for x, value in zip(changed, before):
                x.copy_(value)
        return all(torch.allclose(replayed, done, rtol=1e-3, atol=1e-5) for done, replayed in zip(*results))

    def _records(self, tensor: Tensor) -> bool:
        if not self.enabled or not tensor.is_cuda:
            return False
        # What is recorded is what happens on the current device.
        if tensor.device.index != torch.cuda.current_device() or torch.cuda.is_current_stream_capturing():
            return False
        return not distributed.is_distributed() or dist.get_backend() == "nccl"

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files begin without a recording.
        return {"enabled": self.enabled, "recorder": self.recorder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        InnerLoop.__init__(self, **state)
