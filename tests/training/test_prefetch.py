"""The next batch is checked and on its way before the loop asks for it; on a CPU nothing is taken early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from small_training import CPU, make_args, make_batches, make_training
from training import loop
from training.data import Batch
from training.errors import OneRankError
from training.prefetch import Arriving, Prefetcher, StreamMover, mover_for


class Recorded:
    """Batches 0, 1, 2 and everything that happens to them, in order."""

    def __init__(self, bad: int | None = None) -> None:
        self.events: list[str] = []
        self.bad = bad
        self.arrays = make_batches(3, 4)

    def batches(self) -> Iterator[Batch]:
        """As a loader gives them."""
        for number, batch in enumerate(self.arrays):
            self.events.append(f"load {number}")
            yield batch

    def check(self, batch: Batch) -> None:
        """Refuses the bad one."""
        self._note("check", batch)
        if self.bad is not None and batch is self.arrays[self.bad]:
            raise OneRankError("no place for this key")

    def begin(self, batch: Batch) -> Arriving:
        """Of a mover."""
        self._note("begin", batch)
        return Arriving(batch, None)  # type: ignore[arg-type]

    def finish(self, arriving: Arriving) -> Batch:
        """Of a mover."""
        self._note("finish", arriving.batch)
        return arriving.batch

    def _note(self, what: str, batch: Batch) -> None:
        number = next(i for i, array in enumerate(self.arrays) if array is batch)
        self.events.append(f"{what} {number}")


def test_the_next_batch_is_under_way_before_it_is_asked_for() -> None:
    record = Recorded()
    batches = Prefetcher(record.batches(), record.check, record)
    for number, batch in enumerate(batches):
        assert batch is record.arrays[number]
        record.events.append(f"step {number}")
        batches.fetch()
        batches.fetch()  # a second time changes nothing
        record.events.append(f"log {number}")
    assert record.events == [
        *("load 0", "check 0", "begin 0", "finish 0", "step 0"),
        *("load 1", "check 1", "begin 1", "log 0", "finish 1", "step 1"),
        *("load 2", "check 2", "begin 2", "log 1", "finish 2", "step 2", "log 2"),
    ]


def test_without_a_call_to_fetch_every_batch_comes_all_the_same() -> None:
    record = Recorded()
    assert [id(batch) for batch in Prefetcher(record.batches(), record.check, record)] == list(map(id, record.arrays))


def test_without_a_mover_nothing_is_taken_early() -> None:
    record = Recorded()
    batches = Prefetcher(record.batches(), record.check, None)
    for number, batch in enumerate(batches):
        assert batch is record.arrays[number]
        record.events.append(f"step {number}")
        batches.fetch()
    assert record.events == [event for n in range(3) for event in (f"load {n}", f"check {n}", f"step {n}")]


@pytest.mark.parametrize("moved", [True, False])
def test_a_bad_key_is_found_before_its_batch_is_copied(moved: bool) -> None:
    record = Recorded(bad=1)
    batches = Prefetcher(record.batches(), record.check, record if moved else None)
    next(batches)
    with pytest.raises(OneRankError, match="no place"):
        next(batches)
    assert "begin 1" not in record.events


def test_a_cpu_and_micro_batches_have_no_mover() -> None:
    assert mover_for(CPU, 1) is None
    assert mover_for(torch.device("cuda"), 2) is None


class FakeStream:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.waited: list[str] = []

    def record_event(self) -> str:
        """The event of all that was queued."""
        return "copied"

    def wait_event(self, event: str) -> None:
        """What follows is for after the event."""
        self.waited.append(event)


def test_copies_are_ordered_with_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream that only writes down what it is told: copies are queued in it, the computing one waits, memory is kept."""
    copying, computing, within, kept = FakeStream(), FakeStream(), [], []

    @contextmanager
    def stream(given: FakeStream) -> Iterator[None]:
        within.append(given)
        yield
        within.pop()

    def to(tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        assert within == [copying]
        assert non_blocking
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, given: kept.append((id(tensor), given)))
    mover = StreamMover(torch.device("cuda"))
    (batch,) = make_batches(1, 4)
    arriving = mover.begin(batch)
    assert computing.waited == []
    moved = mover.finish(arriving)
    assert computing.waited == ["copied"]
    assert copying.waited == []
    assert kept == [(id(tensor), computing) for tensor in moved]
    assert all(torch.equal(one, other) for one, other in zip(moved, batch))
    without_keys = mover.finish(mover.begin(batch._replace(keys=None)))
    assert without_keys.keys is None


def test_the_loop_fetches_between_the_step_and_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(make_args("--epochs", "1", "--log-every-n-steps", "1"), make_batches(2, 4))
    order: list[str] = []

    class Watched(Prefetcher):
        def fetch(self) -> None:
            order.append("fetch")
            super().fetch()

    def then(name: str, function: Any) -> Any:
        def wrapped(*given: Any) -> Any:
            order.append(name)
            return function(*given)

        return wrapped

    monkeypatch.setattr(loop, "Prefetcher", Watched)
    monkeypatch.setattr(loop, "training_step", then("step", loop.training_step))
    monkeypatch.setattr(loop, "_log", then("log", loop._log))
    loop.train_one_epoch(training, 0)
    assert order == ["step", "fetch", "log"] * 2
