"""Repeats an update of few large operations, without the host between them where the device allows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
import torch.distributed as dist
from torch import Tensor

from neuclip import distributed

Program = Callable[[], None]


def record_cuda_graph(program: Program) -> Program:
    """Record what a program does on the GPU, without doing it; the result does it, at one launch from the host."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may call CUDA meanwhile: the loader's pins memory, NCCL's watchdog asks for events.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        program()
    return graph.replay


class InnerLoop:
    """Calls an update that changes tensors in place a number of times on the same inputs.

    On a GPU, and where ranks talk through NCCL, the update is recorded as a CUDA graph and replayed: an update is some
    thirty small kernels and two messages, which the host launches more slowly than the GPU runs them. The first run of
    each kind goes without, because libraries and communicators set themselves up in it.

    Args:
        enabled: whether to record at all.
        recorder: turns a program into its recording.
    """

    def __init__(self, enabled: bool = True, recorder: Callable[[Program], Program] = record_cuda_graph) -> None:
        self.enabled = enabled
        self.recorder = recorder
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
        """Call `update(*inputs)` `times` times.

        Args:
            inputs: what it reads; they may be other tensors, and have other contents, in every run.
            changed: what it reads and changes in place.
            constants: whatever else it depends on. A recording holds for the same constants only.
        """
        if times == 0:
            return
        if not self._records(inputs[0]):
            for _ in range(times):
                update(*inputs)
            return
        # A recording holds addresses: it is of no use once one of the tensors has moved.
        kind = (
            constants,
            *((x.shape, x.stride(), x.dtype, x.device) for x in inputs),
            *((x.data_ptr(), x.shape, x.dtype) for x in changed),
        )
        if kind != self._kind:
            self._kind, self._static, self._recording = kind, (), None
            for _ in range(times):
                update(*inputs)
            return
        self._replay(update, inputs, times)

    def _replay(self, update: Callable[..., None], inputs: tuple[Tensor, ...], times: int) -> None:
        if self._recording is None:
            self._static = tuple(torch.empty_like(x) for x in inputs)
            try:
                self._recording = self.recorder(lambda: update(*self._static))
            except RuntimeError as error:
                # A graph saves launches and nothing else: no reason to end a run.
                logging.warning("the inner loop of the NPN is not recorded as a CUDA graph: %s", error)
                self.enabled, self._static = False, ()
                for _ in range(times):
                    update(*inputs)
                return
        for static, x in zip(self._static, inputs):
            static.copy_(x)
        for _ in range(times):
            self._recording()

    def _records(self, tensor: Tensor) -> bool:
        if not self.enabled or not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
            return False
        return not distributed.is_distributed() or dist.get_backend() == "nccl"
