"""Signals that ask a run to end: slurm's warning before a time limit or a preemption, a batch system's SIGTERM, ^C.

From `Signals.__enter__` on, SIGUSR1, SIGTERM and SIGINT no longer end the process. The first one is remembered: the loop asks
at every step boundary, all ranks agree, a checkpoint is written, and the run ends with EXIT_INTERRUPTED. A second one ends the
process at once, with status 128 + its number. Two exceptions, because of how signals are sent:

- The same signal again within SETTLE_SECONDS is the same request: a terminal sends ^C to every process, and a launcher
  passes its own on.
- SIGTERM after SIGUSR1 is how a batch system goes on after its warning; half a minute later it kills. Nothing would be won
  by giving up the checkpoint that is being written.

Python runs handlers in the main thread, and only between two instructions of Python. While that thread waits in a collective
or a file system nothing would happen; so a second thread reads the numbers of signals from a pipe into which the interpreter's
C handler writes them at once (signal.set_wakeup_fd).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

# Interrupted, with a checkpoint: start again with --resume latest to go on. EX_TEMPFAIL of sysexits.h: "try again later".
EXIT_INTERRUPTED = 75
SETTLE_SECONDS = 1.0
# For slurm's controller to answer, twice.
REQUEUE_SECONDS = 60
_ASKING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_END = b"\0"  # no signal has this number


class Signals:
    """Remembers that the run was asked to end; a context manager.

    Args:
        before_training: called with the first signal while `armed` is False, when there is nothing to save yet.

    Attributes:
        end: called after that with a line that says so, from the thread that watches for signals; must end the process with
            EXIT_INTERRUPTED. Whoever knows of other ranks sets it, so that these end too.
        received: the first signal, or None.
        armed: whether somebody asks for `received` at step boundaries.
    """

    def __init__(self, before_training: Callable[[signal.Signals], None] = lambda _: None) -> None:
        self.received: signal.Signals | None = None
        self.armed = False
        self.end: Callable[[str], object] = _end_alone
        self._before_training = before_training
        self._last = 0.0
        self._latest: signal.Signals | None = None
        self._pipe: tuple[int, int] | None = None
        self._heard = threading.Event()

    def __enter__(self) -> Signals:
        # Elsewhere than in the main thread Python sets no handlers; a trainer embedded there has its own way to stop.
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._handlers_before = {number: signal.signal(number, _do_nothing) for number in _ASKING}
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
            # A signal that was blocked until somebody would heed it arrives now, and comes before whatever else would be
            # found out: the other thread gets its time.
            kept = signal.sigpending() & set(_ASKING)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)
            if kept:
                self._heard.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is not None:
            for number, handler in self._handlers_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            # Closing would not end the thread: workers that were forked meanwhile hold the pipe open too.
            os.write(self._pipe[1], _END)
            os.close(self._pipe[1])
            self._pipe = None

    def _watch(self, source: int) -> None:
        while _END[0] not in (numbers := os.read(source, 64)):
            for number in numbers:
                # Other signals that Python handles, such as SIGCHLD, come through the pipe too.
                if number in _ASKING:
                    self._arrived(signal.Signals(number))
                    self._heard.set()
        os.close(source)

    def _arrived(self, asked: signal.Signals) -> None:
        now = time.monotonic()
        before, self._latest = self._latest, asked
        repeated = asked == before and now - self._last < SETTLE_SECONDS
        self._last = now
        if self.received is None:
            self.received = asked
            if self.armed:
                logging.warning("%s: ending after this step; once more ends at once", asked.name)
            else:
                self._before_training(asked)
                self.end(f"{asked.name} before the first step: nothing to save")
        elif repeated or (before == signal.SIGUSR1 and asked == signal.SIGTERM):
            return
        else:
            _say(f"{asked.name} again: ending at once")
            os._exit(128 + asked)


def requeue_job() -> None:
    """Put this slurm job back into the queue under its own number. To be called by one rank, when all have saved.

    A job that cannot be requeued is told in the log; the checkpoint is there all the same.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        logging.warning("--requeue-on-signal: there is no SLURM_JOB_ID, so no job to requeue")
        return
    if _scontrol("requeue", job) is not None:
        logging.info("job %s goes back into the queue", job)


def is_preempted() -> bool:
    """Whether this slurm job is about to lose its nodes to another one. To be called by one rank.

    Slurm requeues a preempted job when its time of grace is over. One that ends by itself before, as it is told to by
    SIGTERM, has merely failed and stays away.
    """
    job = os.environ.get("SLURM_JOB_ID")
    shown = _scontrol("show", "job", job) if job is not None else None
    return shown is not None and re.search(r"\bPreemptTime=\d", shown) is not None


def _scontrol(*words: str) -> str | None:
    """What scontrol prints; None when it fails, which is told in the log."""
    command = ["scontrol", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REQUEUE_SECONDS / 2, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        logging.error("--requeue-on-signal: %s failed (%s)", " ".join(command), error)
        return None
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"status {done.returncode}"
        logging.error("--requeue-on-signal: %s: %s", " ".join(command), reason)
        return None
    return done.stdout


def _do_nothing(_number: int, _frame: object) -> None:
    """The thread acts. A handler there must be, or the interpreter's C handler would not be called."""


def _end_alone(text: str) -> NoReturn:
    _say(text)
    os._exit(EXIT_INTERRUPTED)


def _say(text: str) -> None:
    # Not through logging: whoever holds its lock may be what hangs.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
