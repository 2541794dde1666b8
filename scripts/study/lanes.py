"""Commands side by side, each a process of its own."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from study.errors import StudyError

ROOT = Path(__file__).resolve().parents[2]
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Job:
    """A command of the checkout to be run, whose output is appended to a file."""

    name: str
    words: tuple[str, ...]
    output: Path


def work_off(jobs: Sequence[Job], lanes: int) -> None:
    """Run all jobs, so many at a time.

    On a machine with GPUs lane i has GPU i modulo their number to itself; else lanes share the cores. SIGTERM, ^C and the
    end of a connection are passed on: trainings save, and a later call goes on.

    Raises:
        StudyError: jobs have failed; the others have been done all the same.
    """
    crew = _Crew(jobs, lanes)
    # Under nohup the end of a connection is ignored, and stays so.
    heard = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, crew.stop) for number in heard}
    try:
        crew.work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if crew.stopped:
        raise StudyError("interrupted; the same command goes on")
    if crew.failed:
        raise StudyError("failed: " + ", ".join(f"{job.name} (see {job.output})" for job in crew.failed))


def lanes_of_this_machine() -> int:
    """One per GPU; without any, one per core."""
    return len(gpus()) or os.cpu_count() or 1


class _Crew:
    """Threads that each start one process after the other."""

    def __init__(self, jobs: Sequence[Job], lanes: int) -> None:
        self.failed: list[Job] = []
        self.stopped = False
        self._due: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            self._due.put(job)
        self._lanes = lanes
        self._gpus = gpus()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def work(self) -> None:
        threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in range(self._lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a plain join() would keep the handler of a signal waiting
                thread.join(0.5)

    def stop(self, number: int, _frame: object) -> None:
        self.stopped = True
        for process in list(self._running.values()):
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _lane(self, lane: int) -> None:
        while not self.stopped:
            try:
                job = self._due.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            try:
                status: int | str = self._do(job, lane)
            except OSError as error:  # A full disk, or no memory for one more process.
                status = f"not begun ({error})"
            print(f"{job.name}: status {status} after {time.monotonic() - began:.0f} s", flush=True)
            if status != 0 and not self.stopped:
                self.failed.append(job)

    def _do(self, job: Job, lane: int) -> int:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        with job.output.open("ab") as out:
            # A session of its own: ^C at a terminal would reach it twice, and twice means at once.
            process = subprocess.Popen(
                [sys.executable, "-u", *job.words],
                cwd=ROOT,
                env=self._environment(lane),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running[lane] = process
            if self.stopped:
                process.terminate()
            status = process.wait()
            del self._running[lane]
        return status

    def _environment(self, lane: int) -> dict[str, str]:
        own = {"PYTHONPATH": str(ROOT / "src")}
        if self._gpus:
            own["CUDA_VISIBLE_DEVICES"] = self._gpus[lane % len(self._gpus)]
        else:
            own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self._lanes))
        return {**os.environ, **own}


def gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, of the GPUs that torch finds: the variable may be set where there are none."""
    import torch

    count = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if chosen is None else chosen.split(",")
    return list(names)[:count]
