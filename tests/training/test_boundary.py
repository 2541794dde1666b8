"""What is due between two steps, and how runs end: decided alike on all ranks."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from neuclip.stopwatch import Stopwatch
from ranks import run_on_ranks
from small_training import ALONE, CPU, make_args
from training.boundary import FAILED, FEWEST_JUDGED, Boundary, Ending
from training.data.report import DataReport
from training.data.samples import Counts
from training.distributed import Channel, World
from training.finite import HOPELESS_STEPS, Finding
from training.interval import Interval
from training.preemption import EXIT_INTERRUPTED

STEPS = 10


class FakeSaver:
    """Notes what it is asked to save: (step, numbered, last)."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, bool, bool]] = []
        self.busy = False
        self.failed = False
        self.saved_between = 0
        self.before = (0, 0)

    def within_epoch(self, steps_done: int, numbered: bool, last: bool = False) -> None:
        """A checkpoint."""
        self.saved.append((steps_done, numbered, last))

    def between_epochs(self) -> None:
        """A checkpoint of a whole epoch, where there is none yet."""
        self.saved_between += 1

    def totals_before(self) -> tuple[int, int]:
        """What interrupted processes counted."""
        return self.before

    def report(self, _steps_done: int) -> DataReport:
        """The data so far."""
        report = DataReport()
        report.add(Counts(1, {("broken picture", "a.tar"): 2}, "a.tar: x"))
        return report


class Rank:
    """One rank's Boundary among things that tests set. A step takes `seconds`.

    Attributes:
        endings: by step, those that were not None.
    """

    def __init__(self, *flags: str, world: World = ALONE, seconds: float = 1.0) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.counts = Counts(0, {}, "")
        self.findings: list[Finding] = []
        self.saver = FakeSaver()
        self.signals = SimpleNamespace(received=None)
        self.log: list[Finding] = []
        self.guard = SimpleNamespace(findings=self._find, in_a_row=0)
        self.training = SimpleNamespace(
            args=make_args("--objective", "openclip", "--epochs", "3", *flags),
            world=world,
            state=SimpleNamespace(step=0, epoch=0),
            loader=SimpleNamespace(steps_per_epoch=STEPS, totals=lambda _: self._totals()),
            guard=self.guard,
        )
        self.boundary = Boundary(
            self.training,
            self.saver,
            self.signals,
            SimpleNamespace(add=self.log.extend),
            started=0.0,
            clock=lambda: self.now,
        )

    def _totals(self) -> tuple[int, int]:
        return self.counts.good, sum(self.counts.problems.values())

    def step(self) -> Ending | None:
        """Take one."""
        self.training.state.step += 1
        self.now += self.seconds
        return self.boundary.after_step(self.training.state.step, Interval(False, Stopwatch()))

    def steps(self, count: int, before: Callable[[int], None] = lambda _: None) -> dict[int, Ending]:
        """Take some, as long as none ends the run; `before` is called with each one's number."""
        for _ in range(count):
            number = self.training.state.step + 1
            before(number)
            ending = self.step()
            if ending is not None:
                return {number: ending}
        return {}

    def _find(self, wait: bool = False) -> list[Finding]:
        found, self.findings = self.findings, []
        return found


def finding(step: int, rank: int = 0) -> Finding:
    """A loss that is not finite."""
    return Finding(step, rank, "loss", math.nan, 0.07, None, None)


def test_nothing_is_due_by_itself() -> None:
    rank = Rank()
    assert rank.steps(STEPS) == {}
    assert rank.boundary.after_epoch() is None
    assert rank.boundary.after_evaluation(STEPS) is None
    assert rank.saver.saved == []


def test_every_n_steps() -> None:
    rank = Rank("--save-every-n-steps", "4")
    assert rank.steps(STEPS) == {}
    assert rank.saver.saved == [(4, True, False), (8, True, False)]
    assert not rank.boundary.save_is_due


def test_what_is_due_with_the_last_step_is_left_to_the_epochs_checkpoint() -> None:
    rank = Rank("--save-every-n-steps", "5")
    rank.steps(STEPS)
    assert rank.saver.saved == [(5, True, False)]
    assert rank.boundary.save_is_due
    rank.boundary.after_epoch()
    assert not rank.boundary.save_is_due


def test_minutes_count_from_the_last_checkpoint() -> None:
    rank = Rank("--save-every-minutes", "2", seconds=50.0)
    rank.steps(STEPS - 1)
    assert [step for step, _, _ in rank.saver.saved] == [3, 6, 9]
    by_steps_too = Rank("--save-every-minutes", "2", "--save-every-n-steps", "2", seconds=50.0)
    by_steps_too.steps(STEPS - 1)
    assert [step for step, _, _ in by_steps_too.saver.saved] == [2, 4, 6, 8]


def test_a_checkpoint_that_is_being_written_postpones_the_next() -> None:
    rank = Rank("--save-every-n-steps", "4")

    def writing(step: int) -> None:
        rank.saver.busy = step < 7

    rank.steps(STEPS - 1, writing)
    assert [step for step, _, _ in rank.saver.saved] == [7, 8]


@pytest.mark.parametrize(
    ("asked", "requeues"), [(signal.SIGUSR1, True), (signal.SIGTERM, False), (signal.SIGINT, False)]
)
def test_signal_ends_with_a_checkpoint(asked: signal.Signals, requeues: bool) -> None:
    rank = Rank("--save-every-n-steps", "4")
    rank.steps(2)
    rank.signals.received = asked
    ending = rank.step()
    assert ending == ("asked to end by a signal", EXIT_INTERRUPTED, True, requeues)
    assert rank.saver.saved == [(3, False, True)]


def test_signal_where_a_checkpoint_is_due_as_well() -> None:
    rank = Rank("--save-every-n-steps", "4")
    rank.steps(3)
    rank.signals.received = signal.SIGTERM
    assert rank.step() is not None
    assert rank.saver.saved == [(4, True, True)]


def test_signal_in_the_last_step_and_after_it() -> None:
    rank = Rank()
    rank.steps(STEPS - 1)
    rank.signals.received = signal.SIGTERM
    assert rank.step() is None
    for ending in (rank.boundary.after_epoch(), rank.boundary.after_evaluation(STEPS)):
        assert ending is not None
        assert ending.status == EXIT_INTERRUPTED
    assert rank.saver.saved == []


def test_hours() -> None:
    rank = Rank("--max-hours", "0.5", seconds=500.0)
    endings = rank.steps(4)
    assert endings == {4: Ending("--max-hours are over", EXIT_INTERRUPTED, True, True)}
    assert rank.saver.saved == [(4, False, True)]


def test_hours_end_no_run_that_is_through() -> None:
    rank = Rank("--max-hours", "0.5", seconds=400.0)
    rank.steps(STEPS)
    rank.training.state.epoch = 2
    assert rank.boundary.after_epoch() is not None
    rank.training.state.epoch = 3
    assert rank.boundary.after_epoch() is None
    rank.signals.received = signal.SIGTERM
    assert rank.boundary.after_epoch() is not None


def test_share_of_broken_data() -> None:
    rank = Rank("--max-bad-fraction", "0.1")
    problems = {("broken picture", "a.tar"): FEWEST_JUDGED // 5 - 1}
    rank.counts = Counts(FEWEST_JUDGED * 4 // 5, problems, "")
    assert rank.step() is None, "too few to judge by"
    rank.counts = Counts(FEWEST_JUDGED * 9 // 10, {("broken picture", "a.tar"): FEWEST_JUDGED // 10}, "")
    assert rank.step() is None, "exactly as many as are allowed"
    rank.counts = Counts(FEWEST_JUDGED * 4 // 5, {("broken picture", "a.tar"): FEWEST_JUDGED // 5}, "")
    ending = rank.step()
    assert ending is not None
    assert (ending.status, ending.saves, ending.requeues) == (FAILED, True, False)
    assert "--max-bad-fraction 0.1" in ending.reason
    assert "2 broken picture" in ending.reason
    assert rank.saver.saved == [(3, False, True)]


def test_an_interruption_between_epochs_has_a_checkpoint() -> None:
    """Also where --save-frequency has none for this epoch."""
    rank = Rank()
    rank.steps(STEPS)
    rank.training.state.epoch = 1
    assert rank.boundary.after_epoch() is None
    assert rank.saver.saved_between == 0
    rank.signals.received = signal.SIGUSR1
    ending = rank.boundary.after_evaluation(STEPS)
    assert ending is not None
    assert ending.status == EXIT_INTERRUPTED
    assert rank.saver.saved_between == 1


def test_an_interruption_that_cannot_be_saved_is_a_failure() -> None:
    """A job that is requeued would begin anew, or far back."""
    rank = Rank()
    rank.saver.failed = True
    rank.signals.received = signal.SIGUSR1
    for ending in (rank.step(), rank.boundary.after_epoch()):
        assert ending is not None
        assert (ending.status, ending.requeues) == (FAILED, False)
        assert "could not be written" in ending.reason


def test_a_run_without_its_last_checkpoint_has_failed() -> None:
    rank = Rank()
    rank.saver.failed = True
    assert rank.steps(STEPS) == {}, "a full disk costs checkpoints, not the run"
    rank.training.state.epoch = 2
    assert rank.boundary.after_epoch() is None
    rank.training.state.epoch = 3
    ending = rank.boundary.after_epoch()
    assert ending is not None
    assert ending.status == FAILED


def test_what_interrupted_processes_counted_is_judged_too() -> None:
    rank = Rank("--max-bad-fraction", "0.1")
    rank.counts = Counts(8, {("broken picture", "a.tar"): 2}, "")
    rank.saver.before = (990, 0)
    assert rank.steps(STEPS) == {}
    assert rank.boundary.after_epoch() is None
    rank.saver.before = (500, 490)
    assert rank.boundary.after_epoch() is not None


def test_few_samples_are_judged_when_the_epoch_is_through() -> None:
    rank = Rank("--max-bad-fraction", "0.1")
    rank.counts = Counts(8, {("broken picture", "a.tar"): 2}, "")
    assert rank.steps(STEPS) == {}
    ending = rank.boundary.after_epoch()
    assert ending is not None
    assert ending.status == FAILED


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_that_could_not_be_written(strict: bool) -> None:
    rank = Rank("--save-every-n-steps", "2", *(["--strict-save"] if strict else []))
    rank.saver.failed = True
    ending = rank.step()
    assert (ending is not None) == strict
    if ending is not None:
        assert (ending.status, ending.saves) == (FAILED, False)
        assert "--strict-save" in ending.reason
        assert rank.saver.saved == []


def test_finding_is_told_and_goes_on() -> None:
    rank = Rank()
    rank.findings = [finding(1)]
    assert rank.steps(2) == {}
    assert rank.log == [finding(1)]


def test_finding_stops_before_anything_is_saved() -> None:
    rank = Rank("--on-nonfinite", "stop", "--save-every-n-steps", "1")
    rank.step()
    rank.findings = [finding(2)]
    ending = rank.step()
    assert ending is not None
    assert (ending.status, ending.saves) == (FAILED, False)
    assert rank.saver.saved == [(1, True, False)]
    assert rank.log == [finding(2)]


def test_finding_in_the_last_step_stops_before_the_epochs_checkpoint() -> None:
    rank = Rank("--on-nonfinite", "stop")
    assert rank.steps(STEPS - 1) == {}
    rank.findings = [finding(STEPS)]
    ending = rank.step()
    assert ending is not None
    assert (ending.status, ending.saves) == (FAILED, False)


def test_hopeless_run_ends() -> None:
    rank = Rank("--save-every-n-steps", "1")
    rank.guard.in_a_row = HOPELESS_STEPS - 1
    assert rank.step() is None
    rank.guard.in_a_row = HOPELESS_STEPS
    ending = rank.step()
    assert ending is not None
    assert (ending.status, ending.saves) == (FAILED, False)
    assert "lower --lr" in ending.reason
    assert rank.saver.saved == [(1, True, False)]


def _two_ranks(flags: list[str], what: str) -> tuple[dict[int, Ending], list[tuple[int, bool, bool]], int]:
    """Something happens on rank 1 alone before the 3rd step, and on rank 0 alone before the 6th."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU, Channel(dist.new_group(backend="gloo")))
    rank = Rank(*flags, world=world)

    def happen(step: int) -> None:
        if step != (6 if world.is_main else 3):
            return
        if what == "clock":
            rank.now += 3600.0
        elif what == "signal":
            rank.signals.received = signal.SIGUSR1
        elif what == "finding":
            rank.findings = [finding(step, world.rank)]

    endings = rank.steps(STEPS - 1, happen)
    return endings, rank.saver.saved, len(rank.log)


@pytest.mark.parametrize(
    ("flags", "what", "saved", "ends"),
    [
        # Clocks of other ranks than 0 do not count. All act one step later.
        (["--save-every-minutes", "30"], "clock", [(7, True, False)], []),
        (["--max-hours", "0.5"], "clock", [(7, False, True)], [7]),
        ([], "signal", [(4, False, True)], [4]),
        # But before a checkpoint.
        (["--on-nonfinite", "stop"], "finding", [], [4]),
        (["--on-nonfinite", "stop", "--save-every-n-steps", "3"], "finding", [], [3]),
    ],
    ids=["minutes", "hours", "signal", "stop", "stop and save"],
)
def test_ranks_decide_alike(flags: list[str], what: str, saved: list[tuple[int, bool, bool]], ends: list[int]) -> None:
    first, second = run_on_ranks(_two_ranks, 2, flags, what)
    assert first[:2] == second[:2]
    endings, found, told = first
    assert list(endings) == ends
    assert found == saved
    assert (told, second[2]) == (what == "finding", 0)
