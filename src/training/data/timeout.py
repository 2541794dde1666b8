"""--data-timeout: an end to waiting for batches that do not come."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from training.errors import OneRankError

T = TypeVar("T")
# What torch's DataLoader says of workers that were silent for its timeout.
_TIMED_OUT = "DataLoader timed out"


class DataTimeoutError(OneRankError):
    """No batch came for as long as --data-timeout allows."""


def end_process(message: str) -> NoReturn:
    """Say it on stderr and end this process with status 1."""
    # A batch is made in the calling thread, which may be held up in a system call that nothing interrupts. Making batches in
    # another thread, so that this one could give up, would break their determinism: augmentation draws from the global
    # generators, seeded around each batch, and so does the training step.
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def patient(
    batches: Iterator[T],
    seconds: float,
    explain: Callable[[], str],
    workers: int,
    give_up: Callable[[str], object] = end_process,
    first: float | None = None,
) -> Iterator[T]:
    """The batches of a loader, until one does not come within `seconds`.

    Args:
        first: seconds for the first batch, if that may take longer.
        batches: of a DataLoader; one with workers was made with timeout=seconds.
        seconds: --data-timeout.
        explain: says what the data hold; must come to an end by itself.
        workers: --workers. With 0 batches are made by the thread that asks for them.
        give_up: called without workers, from another thread, with the message; must end the process.

    Raises:
        DataTimeoutError: while iterating with workers.
    """
    first = seconds if first is None else first
    if workers:
        return _translated(batches, seconds, first, explain)
    return _watched(batches, seconds, first, explain, give_up)


def _message(seconds: float, explain: Callable[[], str]) -> str:
    # Whatever keeps the data from coming may trip up the explanation as well.
    try:
        reason = explain()
    except Exception as error:
        reason = f"the data could not be looked into ({type(error).__name__}: {error})"
    return (
        f"no batch came for {seconds:g} s (--data-timeout {seconds:g}): mend the data or what delivers them, or give more "
        f"time, 0 for no limit\n{reason}"
    )


def _translated(batches: Iterator[T], seconds: float, first: float, explain: Callable[[], str]) -> Iterator[T]:
    # The loader itself gives up after `seconds`, and may be asked again.
    patience = first
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if _TIMED_OUT not in str(error):
                raise
            patience -= seconds
            if patience > 0:
                continue
            raise DataTimeoutError(_message(seconds, explain)) from None
        patience = seconds
        yield batch


def _watched(
    batches: Iterator[T], seconds: float, first: float, explain: Callable[[], str], give_up: Callable[[str], object]
) -> Iterator[T]:
    watchdog = _Watchdog(first, lambda: give_up(_message(seconds, explain)))
    try:
        while True:
            with watchdog.watching():
                batch = next(batches, watchdog)
            watchdog.seconds = seconds
            if batch is watchdog:
                return
            yield batch  # type: ignore[misc]
    finally:
        watchdog.stop()


class _Watchdog:
    """A thread that calls a function when something takes too long."""

    def __init__(self, seconds: float, expired: Callable[[], None]) -> None:
        self.seconds = seconds
        self._expired = expired
        self._changed = threading.Condition()
        self._watching = False
        self._stopped = False
        # Counts what was watched, so that one that ends in time is not taken for the next.
        self._number = 0
        threading.Thread(target=self._run, name="data timeout", daemon=True).start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """What runs in here is watched."""
        self._set(True)
        try:
            yield
        finally:
            self._set(False)

    def stop(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _set(self, watching: bool) -> None:
        with self._changed:
            self._watching = watching
            self._number += 1
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._stopped:
                number = self._number
                changed = self._changed.wait_for(
                    lambda number=number: self._stopped or self._number != number,
                    self.seconds if self._watching else None,
                )
                if not changed:
                    break
        if not self._stopped:
            self._expired()
