"""The next batch goes to the GPU while it computes.

A copy in the stream of the computation would wait for everything queued there and then hold up what follows. Here it runs in
a stream of its own, from page-locked host memory, as soon as a step has been queued; the computation waits for it on the
device, the host never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from training.data import Batch


class Arriving(NamedTuple):
    """A batch on the device whose copy may still be under way, and the event of its end."""

    batch: Batch
    copied: torch.cuda.Event


class Mover(Protocol):
    """Brings batches to a device."""

    def begin(self, batch: Batch) -> Arriving:
        """Start the copy of a batch from host memory. Waits for nothing."""

    def finish(self, arriving: Arriving) -> Batch:
        """The batch, for work that is queued from now on."""


class StreamMover:
    """Copies in a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def begin(self, batch: Batch) -> Arriving:
        """Start the copy of a batch, tensors in page-locked memory; dtypes and strides stay as they are."""
        with torch.cuda.stream(self.stream):
            moved = Batch(*(None if x is None else x.to(self.device, non_blocking=True) for x in batch))
            return Arriving(moved, self.stream.record_event())

    def finish(self, arriving: Arriving) -> Batch:
        """The batch, for the present stream, which waits for the end of the copy."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(arriving.copied)
        for tensor in arriving.batch:
            if tensor is not None:
                # Its memory belongs to the copying stream, which may use it again only after this one is through with it.
                tensor.record_stream(computing)
        return arriving.batch


class Prefetcher(Iterator[Batch]):
    """A rank's batches, each checked in host memory and then brought to the device, one ahead.

    Args:
        batches: in host memory.
        check: called with each batch before anything is copied; what it raises ends the iteration.
        mover: None leaves batches where they are and takes them only when they are asked for.
    """

    def __init__(self, batches: Iterator[Batch], check: Callable[[Batch], None], mover: Mover | None) -> None:
        self._batches = batches
        self._check = check
        self._mover = mover
        self._arriving: Arriving | None = None

    def fetch(self) -> None:
        """Begin the copy of the next batch, if there is one; to be called when the work on the last one has been queued.

        Until the loader has a batch this waits, while the device works. It never waits for the device.
        """
        if self._mover is None or self._arriving is not None:
            return
        batch = next(self._batches, None)
        if batch is not None:
            self._check(batch)
            self._arriving = self._mover.begin(batch)

    def __next__(self) -> Batch:
        if self._mover is None:
            batch = next(self._batches)
            self._check(batch)
            return batch
        self.fetch()
        if self._arriving is None:
            raise StopIteration
        arriving, self._arriving = self._arriving, None
        return self._mover.finish(arriving)


def mover_for(device: torch.device, micro_batches: int) -> Mover | None:
    """What moves a run's batches; None on a CPU, and where a batch is too large to be on the device as a whole.

    Args:
        micro_batches: --accum-freq. Several are moved one at a time, when each is due, so that the device holds only one.
    """
    return StreamMover(device) if device.type == "cuda" and micro_batches == 1 else None
