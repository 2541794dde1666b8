"""The stopwatch of sections, on a host that does the work and on one that queues it; and what each objective times by it."""

from __future__ import annotations

import copy
import pickle
import time
from collections import deque

import pytest
import torch

from neuclip import OBJECTIVES, RunShape, make_objective
from neuclip.stopwatch import Stopwatch

from .conftest import FeatureMaker

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_sections_add_up_and_may_lie_within_each_other() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.section("outer", CPU):
            time.sleep(0.01)
            with watch.section("inner", CPU):
                time.sleep(0.02)
    found = watch.seconds()
    assert 0.04 <= found["inner"] < 0.2
    assert found["outer"] >= found["inner"] + 0.02
    watch.restart()
    assert watch.seconds() == {}


def test_a_section_that_raises_is_not_counted() -> None:
    watch = Stopwatch()
    with pytest.raises(ValueError, match="broken"), watch.section("part", CPU):
        raise ValueError("broken")
    assert watch.seconds() == {}


class Device:
    """A GPU as events see it. Operations are queued, and done in order when somebody lets the time pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = 0.0
        self.queue: deque[float | Event] = deque()
        self.events = 0
        self.waited = False
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self, enable_timing))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def work(self, seconds: float) -> None:
        self.queue.append(seconds)

    def catch_up(self) -> None:
        while self.queue:
            item = self.queue.popleft()
            if isinstance(item, Event):
                item.reached = self.clock
            else:
                self.clock += item


class Event:
    def __init__(self, device: Device, enable_timing: bool) -> None:
        assert enable_timing
        device.events += 1
        self.device, self.reached = device, 0.0

    def record(self, stream: object) -> None:
        assert stream is self.device
        assert self not in self.device.queue, "recorded again before the device came to it"
        self.device.queue.append(self)

    def query(self) -> bool:
        return self not in self.device.queue

    def synchronize(self) -> None:
        self.device.waited = True
        self.device.catch_up()

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query()
        return 1000 * (end.reached - self.reached)


def test_on_a_gpu_the_devices_time_counts_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    device, watch = Device(monkeypatch), Stopwatch()
    for _ in range(3):
        with watch.section("outer", GPU):
            device.work(1.0)
            with watch.section("inner", GPU):
                device.work(2.0)
        device.work(10.0)
    assert not device.waited
    assert device.clock == 0.0
    assert watch.seconds() == pytest.approx({"inner": 6.0, "outer": 9.0})
    assert device.waited


def test_events_are_as_many_as_the_device_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    device, watch = Device(monkeypatch), Stopwatch()
    for step in range(1000):
        with watch.section("part", GPU):
            device.work(0.5)
        if step % 4 == 3:
            device.catch_up()
    assert device.events <= 12
    assert watch.seconds()["part"] == pytest.approx(500.0)


def test_what_the_device_has_not_done_is_forgotten_by_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    device, watch = Device(monkeypatch), Stopwatch()
    with watch.section("part", GPU):
        device.work(1.0)
    watch.restart()
    # An event that was taken up again here would be in the queue twice.
    with watch.section("part", GPU):
        device.work(3.0)
    assert watch.seconds() == pytest.approx({"part": 3.0})


def test_nothing_is_recorded_into_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    device, watch = Device(monkeypatch), Stopwatch()
    device.capturing = True
    with watch.section("part", GPU):
        device.work(1.0)
    assert device.events == 0
    assert watch.seconds() == {}


def test_copies_and_files_begin_with_nothing() -> None:
    watch = Stopwatch()
    with watch.section("part", CPU):
        pass
    for other in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert other.seconds() == {}
        with other.section("other", CPU):
            pass
        assert set(other.seconds()) == {"other"}
    assert set(watch.seconds()) == {"part"}


WITH_NORMALIZER = {
    "fastclip": "--objective fastclip",
    "fastclip v2": "--fastclip --temperature_scheme individual_learnable --gamma_schedule constant",
    "neuclip": "--objective neuclip --npn_num_protos 5",
    "neuclip, simultaneous": "--objective neuclip --npn_optimization simultaneous --npn_num_protos 5",
    "amorlip": "--objective amorlip",
}
RUNS = WITH_NORMALIZER | {name: f"--objective {name}" for name in OBJECTIVES if name not in WITH_NORMALIZER}


@pytest.mark.parametrize("run", RUNS)
def test_an_objective_times_itself(run: str, features: FeatureMaker) -> None:
    objective = make_objective(f"{RUNS[run]} --data_size 100", RunShape(6, 8, 1, 3, 2))
    before = objective.state_dict().keys()
    bias = None if objective.initial_logit_bias is None else torch.tensor(-4.0)
    took = 0.0
    for step in range(3):
        images, texts = features(step, 8, dtype=torch.float32)
        began = time.perf_counter()
        objective(images, texts, torch.tensor(12.0), bias, torch.arange(8))
        took += time.perf_counter() - began
    found = objective.stopwatch.seconds()
    assert set(found) == {"objective", *({"normalizer"} if run in WITH_NORMALIZER else set())}
    assert 0 < found["objective"] < took
    assert 0 <= found.get("normalizer", 0.0) < found["objective"]
    assert objective.state_dict().keys() == before


def test_the_normalizers_section_is_the_networks_work(features: FeatureMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow inner loop shows in it, a slow pair block only in the whole."""
    objective = make_objective("--objective neuclip --npn_num_protos 5", RunShape(6, 8, 1, 3, 2))
    fit = objective.normalizer.fit
    monkeypatch.setattr(objective.normalizer, "fit", lambda *given: (time.sleep(0.05), fit(*given)))
    means = "neuclip.objectives.neuclip.batch_log_means"
    batch_log_means = objective.compute.__globals__["batch_log_means"]
    monkeypatch.setattr(means, lambda *given: (time.sleep(0.1), batch_log_means(*given))[1])
    images, texts = features(0, 8, dtype=torch.float32)
    objective(images, texts, torch.tensor(12.0))
    found = objective.stopwatch.seconds()
    assert 0.05 <= found["normalizer"] < 0.1
    assert found["objective"] >= found["normalizer"] + 0.1
