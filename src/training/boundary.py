"""What is due between two steps: checkpoints, and the end of a run that was asked to end. All ranks decide alike."""

from __future__ import annotations

import logging
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from training.agreement import Agreement
from training.finite import HOPELESS_STEPS, Finding, NonFiniteLog, describe
from training.interval import Interval
from training.loop import Training
from training.preemption import EXIT_INTERRUPTED, Signals
from training.saving import Saver

FAILED = 1
# Fewer samples say nothing about the data: the first one may be broken.
FEWEST_JUDGED = 1000
_NUMBERS = (
    *("warned", "asked", "hours", "minutes", "busy", "save_failed"),
    *("bad", "looked_at", "findings", "hopeless"),
)


class Ending(NamedTuple):
    """Why and how a run ends before its last step.

    Attributes:
        reason: for the log.
        status: exit status.
        saves: whether its state is worth a checkpoint.
        requeues: whether the slurm job may go back into the queue, whatever slurm says of it.
    """

    reason: str
    status: int
    saves: bool
    requeues: bool = False


class Boundary:
    """Asked by the loop after every step.

    Args:
        started: time.monotonic() of the run's start, from which --max-hours counts.
        clock: seconds, as time.monotonic().
    """

    def __init__(
        self,
        training: Training,
        saver: Saver,
        signals: Signals,
        nonfinite: NonFiniteLog,
        started: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._args: Namespace = training.args
        self._training = training
        self._world = training.world
        self._saver = saver
        self._signals = signals
        self._nonfinite = nonfinite
        self._clock = clock
        self._started = started
        self._saved_at = clock()
        self._agreement = Agreement(training.world, _NUMBERS)
        self._untold: list[Finding] = []
        self._save_is_due = False
        self._has_just_saved = False

    def after_step(self, steps_done: int, interval: Interval) -> Ending | None:
        """Save if that is due; returns an ending if the run is to end here, its checkpoint written.

        Args:
            steps_done: of the present epoch. After its last step nothing is saved, since the epoch's own checkpoint follows.
        """
        every = self._args.save_every_n_steps
        if every and self._training.state.step % every == 0:
            self._save_is_due = True
        sums = self._agreement.exchange(self._numbers(steps_done))
        # What was handed in before a checkpoint and comes back after it has been seen to.
        self._save_is_due |= sums["minutes"] > 0 and not self._has_just_saved
        self._has_just_saved = False
        if sums["findings"]:
            self._tell_findings()
        is_epochs_last = steps_done == self._training.loader.steps_per_epoch
        ending = None if is_epochs_last else self._ending(sums, steps_done)
        saves = self._save_is_due and not sums["busy"] if ending is None else ending.saves
        if self._args.on_nonfinite == "stop" and (saves or is_epochs_last):
            # What is saved is to be from before a step that ends the run; sums are of the step before.
            ending = self._stopped(sums) or self._stopped(self._settled(steps_done)) or ending
            saves = saves and (ending is None or ending.saves)
        if saves and not is_epochs_last:
            with interval.paused():
                self._saver.within_epoch(steps_done, ending is None or self._save_is_due, last=ending is not None)
            self._saved()
        return ending if ending is None or not ending.saves else self._if_saved(ending)

    def after_epoch(self) -> Ending | None:
        """The same after an epoch, whose checkpoint has been written; waits for all ranks."""
        self._saved()
        return self._settle(self._training.loader.steps_per_epoch)

    def after_evaluation(self, steps_done: int) -> Ending | None:
        """The same once more: an evaluation takes a while. A signal breaks it off, and it is made up for on resuming.

        Args:
            steps_done: of the epoch that the loader is in: 0 where this evaluation makes up for one that was broken off.
        """
        return self._settle(steps_done)

    def _settle(self, steps_done: int) -> Ending | None:
        sums = self._settled(steps_done)
        if self._training.state.epoch >= self._args.stop_epochs:
            sums["hours"] = 0  # There is nothing left to go on with.
        ending = self._ending(sums, self._training.loader.steps_per_epoch)
        if ending is None or not ending.saves:
            return ending
        # Not every epoch has a checkpoint of its own.
        self._saver.between_epochs()
        return self._if_saved(ending)

    def _if_saved(self, ending: Ending) -> Ending:
        """The ending, or that its checkpoint could not be written: a job that was requeued would have lost its way."""
        if not self._world.from_main(self._saver.failed):
            return ending
        return Ending(f"{ending.reason}, but its checkpoint could not be written", FAILED, saves=False)

    def _settled(self, steps_done: int) -> dict[str, int]:
        sums = self._agreement.settle(self._numbers(steps_done, wait=True))
        if sums["findings"]:
            self._tell_findings()
        return sums

    @property
    def save_is_due(self) -> bool:
        """Whether a checkpoint by steps or minutes has become due with the epoch's last step."""
        return self._save_is_due

    def _saved(self) -> None:
        self._save_is_due = False
        self._has_just_saved = self._world.size > 1
        self._saved_at = self._clock()

    def _numbers(self, steps_done: int, wait: bool = False) -> dict[str, int]:
        """wait: for what the device has not told yet."""
        self._untold += self._training.guard.findings(wait)
        good, bad = self._training.loader.totals(steps_done)
        if self._world.is_main:
            good_before, bad_before = self._saver.totals_before()
            good, bad = good + good_before, bad + bad_before
        is_over = self._training.state.epoch >= self._args.stop_epochs
        received = self._signals.received
        now, main = self._clock(), self._world.is_main
        hours, minutes = self._args.max_hours, self._args.save_every_minutes
        return {
            "warned": received == signal.SIGUSR1,
            "asked": received is not None and received != signal.SIGUSR1,
            # Clocks differ: rank 0's counts.
            "hours": main and hours is not None and now - self._started >= 3600 * hours,
            "minutes": main and minutes is not None and now - self._saved_at >= 60 * minutes,
            "busy": self._saver.busy,
            # The run's last checkpoint is what it was for.
            "save_failed": self._saver.failed and (self._args.strict_save or is_over),
            "bad": bad,
            "looked_at": good + bad,
            "findings": len(self._untold),
            "hopeless": self._training.guard.in_a_row >= HOPELESS_STEPS,
        }

    def _ending(self, sums: dict[str, int], steps_done: int) -> Ending | None:
        if sums["save_failed"]:
            reason = "a checkpoint could not be written and --strict-save is given"
            if self._training.state.epoch >= self._args.stop_epochs:
                reason = "the run's last checkpoint could not be written"
            return Ending(reason, FAILED, saves=False)
        stopped = self._stopped(sums)
        if stopped is not None:
            return stopped
        if sums["hopeless"]:
            return Ending(
                f"{HOPELESS_STEPS} steps in a row had a loss or gradient that is not finite: lower --lr, add "
                "--grad-clip-norm, or look into the keys in nonfinite.jsonl",
                FAILED,
                saves=False,
            )
        if self._is_too_bad(sums, steps_done):
            summary = self._saver.report(steps_done).summary()
            limit = f"--max-bad-fraction {self._args.max_bad_fraction:g}"
            return Ending(f"more of the data is broken than {limit} allows\n{summary}", FAILED, saves=True)
        if sums["warned"] or sums["asked"] or sums["hours"]:
            what = "--max-hours are over" if sums["hours"] else "asked to end by a signal"
            # Not after SIGTERM by itself: that is also how a job is cancelled.
            return Ending(what, EXIT_INTERRUPTED, saves=True, requeues=not sums["asked"])
        return None

    def _stopped(self, sums: dict[str, int]) -> Ending | None:
        if not sums["findings"] or self._args.on_nonfinite != "stop":
            return None
        return Ending(
            "a loss or gradient was not finite and --on-nonfinite stop is given; the last checkpoint is from before",
            FAILED,
            saves=False,
        )

    def _is_too_bad(self, sums: dict[str, int], steps_done: int) -> bool:
        limit = self._args.max_bad_fraction
        whole_epoch = steps_done == self._training.loader.steps_per_epoch
        if limit is None or not (whole_epoch or sums["looked_at"] >= FEWEST_JUDGED):
            return False
        return sums["bad"] > limit * sums["looked_at"]

    def _tell_findings(self) -> None:
        """All ranks come here together, since all have the same sums."""
        everyone = [finding for share in self._world.gather(self._untold) for finding in share]
        self._untold = []
        if not everyone:
            return
        if self._args.on_nonfinite == "stop" and self._world.is_main:
            first = min(finding.step for finding in everyone)
            logging.error(describe([finding for finding in everyone if finding.step == first]))
        if self._world.is_main:
            self._nonfinite.add(everyone)
