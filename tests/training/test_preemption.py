"""Signals: the first is remembered, the second ends the process at once, wherever its main thread is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from end_to_end.runs import MAIN, clean_environment
from training.preemption import EXIT_INTERRUPTED, SETTLE_SECONDS, Signals, is_preempted, requeue_job

IN_PYTHON = "while True: time.sleep(0.05)"
# It locks the same mutex twice: no handler of Python's ever gets its turn.
IN_C = "mutex = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock; lock(mutex); lock(mutex)"


@contextmanager
def process(body: str, armed: bool = True) -> Iterator[subprocess.Popen[str]]:
    code = f"""
import ctypes, logging, os, sys, time
from training.preemption import Signals
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
with Signals(lambda asked: print("early", asked.name, flush=True)) as signals:
    signals.armed = {armed}
    print("ready", flush=True)
    {body}
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_first_is_remembered_second_ends(first: signal.Signals) -> None:
    with process(IN_PYTHON) as child:
        child.send_signal(first)
        assert first.name in line(child)
        time.sleep(SETTLE_SECONDS + 0.2)
        assert child.poll() is None
        child.send_signal(first)
        assert child.wait(5) == 128 + first
        assert "ending at once" in line(child)


def test_second_ends_a_process_that_hangs_outside_python() -> None:
    with process(IN_C) as child:
        child.send_signal(signal.SIGTERM)
        assert "SIGTERM" in line(child)
        child.send_signal(signal.SIGINT)
        assert child.wait(5) == 128 + signal.SIGINT


def test_what_a_launcher_repeats_is_one_request() -> None:
    with process(IN_PYTHON) as child:
        child.send_signal(signal.SIGINT)
        assert "SIGINT" in line(child)
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert child.poll() is None


def test_termination_after_a_warning_leaves_time_to_save() -> None:
    with process(IN_PYTHON) as child:
        child.send_signal(signal.SIGUSR1)
        assert "SIGUSR1" in line(child)
        time.sleep(SETTLE_SECONDS + 0.2)
        child.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(5) == 128 + signal.SIGINT


def test_before_training_there_is_nothing_to_wait_for() -> None:
    with process(IN_PYTHON, armed=False) as child:
        child.send_signal(signal.SIGUSR1)
        assert child.wait(5) == EXIT_INTERRUPTED
        assert line(child) == "early SIGUSR1\n"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    with Signals() as signals:
        signals.armed = True
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while signals.received is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert signals.received == signal.SIGUSR1
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command of that name that writes down its arguments and prints a file `show`; with a file `refuse`, it fails."""
    command = tmp_path / "scontrol"
    refusal = f'[ -e {tmp_path}/refuse ] && {{ echo "not allowed" >&2; exit 1; }}'
    command.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{refusal}\n[ ! -e {tmp_path}/show ] || cat {tmp_path}/show\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return tmp_path


def test_requeue_asks_slurm(scontrol: Path) -> None:
    requeue_job()
    assert (scontrol / "asked").read_text() == "requeue 4711\n"


def test_refused_requeue_is_told(scontrol: Path, caplog: pytest.LogCaptureFixture) -> None:
    (scontrol / "refuse").touch()
    requeue_job()
    assert "scontrol requeue 4711: not allowed" in caplog.text


def test_requeue_without_a_job_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue_job()
    assert "no SLURM_JOB_ID" in caplog.text


@pytest.mark.parametrize(
    ("shown", "preempted"), [("PreemptTime=None", False), ("PreemptTime=2026-11-23T05:50:44", True)]
)
def test_slurm_tells_of_preemption(shown: str, preempted: bool, scontrol: Path) -> None:
    (scontrol / "show").write_text(f"JobState=RUNNING\n   PreemptEligibleTime=2026-11-23T05:50:41 {shown}\n")
    assert is_preempted() == preempted
    assert (scontrol / "asked").read_text() == "show job 4711\n"


def test_a_job_that_slurm_does_not_show_counts_as_not_preempted(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (scontrol / "refuse").touch()
    assert not is_preempted()
    assert "scontrol show job 4711: not allowed" in caplog.text
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not is_preempted()


def test_a_signal_during_the_imports_is_kept(scontrol: Path) -> None:
    flags = (
        "--name",
        "run",
        "--resume",
        "latest",
        "--requeue-on-signal",
        "--logs",
        str(scontrol),
        "--train-data",
        "none.tar",
    )
    with subprocess.Popen(
        [sys.executable, str(MAIN), *flags],
        env={**clean_environment(), "SLURM_JOB_ID": "4711"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        deadline = time.monotonic() + 60
        while not holds_back(child.pid, signal.SIGUSR1) and time.monotonic() < deadline:
            time.sleep(0.001)
        child.send_signal(signal.SIGUSR1)
        said = child.communicate(timeout=120)[0]
    assert child.returncode == EXIT_INTERRUPTED, said
    assert (scontrol / "asked").read_text() == "requeue 4711\n"


def holds_back(process: int, number: signal.Signals) -> bool:
    """Whether a process has blocked a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    blocked = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(blocked, 16) >> (number - 1) & 1)
