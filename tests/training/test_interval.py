"""Accounting between log lines, on a host that does the work and on one that queues it for a device."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from neuclip.stopwatch import Stopwatch
from training.interval import Interval


def test_waiting_is_told_from_working() -> None:
    def slow() -> Iterator[object]:
        for _ in range(3):
            time.sleep(0.02)
            yield object()

    interval = Interval(False, Stopwatch())
    for _ in interval.timed(slow()):  # type: ignore[arg-type]
        interval.step_begins()
        time.sleep(0.06)
        interval.step_ends()
    assert 0.05 < interval.data_share() < 0.6
    assert interval.seconds_per_step() >= 0.08
    interval.restart()
    assert (interval.steps, interval.waited) == (0, 0.0)


def test_sections_are_told_per_step_and_begin_anew_with_the_interval() -> None:
    stopwatch = Stopwatch()
    interval = Interval(False, stopwatch)
    for _ in range(4):
        interval.step_begins()
        with stopwatch.section("part", torch.device("cpu")):
            time.sleep(0.02)
        interval.step_ends()
    assert interval.section_seconds()["part"] >= 0.02
    assert interval.section_seconds()["part"] <= interval.seconds_per_step()
    interval.restart()
    assert interval.section_seconds() == {}


class Device:
    """A GPU as events see it: work is done in order, after it was queued and after what was queued before."""

    def __init__(self) -> None:
        self.busy_until = 0.0

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, time.perf_counter()) + seconds

    def event(self, enable_timing: bool) -> Device.Event:
        assert enable_timing
        return Device.Event(self)

    class Event:
        def __init__(self, device: Device) -> None:
            self.device = device

        def record(self) -> None:
            self.reached = max(self.device.busy_until, time.perf_counter())

        def elapsed_time(self, end: Device.Event) -> float:
            return 1000 * (end.reached - self.reached)


@pytest.mark.parametrize(("loading", "computing", "share"), [(0.01, 0.05, 0.0), (0.05, 0.01, 0.8)])
def test_a_device_is_short_of_data_only_when_it_has_nothing_to_do(
    loading: float, computing: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host does nothing but wait for the loader in both cases."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)

    def batches() -> Iterator[object]:
        for _ in range(8):
            time.sleep(loading)
            yield object()

    interval = Interval(True, Stopwatch())
    for _ in interval.timed(batches()):  # type: ignore[arg-type]
        interval.step_begins()
        device.work(computing)
        interval.step_ends()
    time.sleep(max(0.0, device.busy_until - time.perf_counter()))  # as reading the loss does
    # The first batch belongs to no gap.
    assert interval.data_share() == pytest.approx(share * 7 / 8, abs=0.1)
