"""One process at a time trains a run."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from training import run_lock
from training.errors import UserError
from training.run_lock import lock_run

ROOT = Path(__file__).resolve().parents[2]
# Takes the lock, forks a child that lives on, as loaders do, says so and waits.
HOLDER = """
import os, sys, time
from pathlib import Path
from training.run_lock import lock_run
held = lock_run(Path(sys.argv[1]))
if os.fork() == 0:
    os.close(1)
    time.sleep(float(sys.argv[2]))
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


class Holder:
    """Another process that trains the run."""

    def __init__(self, folder: Path, job: str | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= {"PYTHONPATH": str(ROOT / "src")} | ({} if job is None else {"SLURM_JOB_ID": job})
        command = [sys.executable, "-c", HOLDER, str(folder), "3"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        """As a node that runs out of memory does it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path)
    yield holder
    holder.kill()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_run_that_another_process_trains_is_refused(other: Holder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--name {tmp_path.name} is being trained by process {other.process.pid} on "):
        lock_run(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["process"] == other.process.pid


def test_a_process_that_is_killed_gives_the_run_back_though_its_children_live(other: Holder, tmp_path: Path) -> None:
    other.kill()
    held = lock_run(tmp_path)
    assert held is not None
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    held.close()


def test_the_end_of_the_other_one_is_waited_for(
    other: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 60.0)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: other.kill())
    held = lock_run(tmp_path)
    assert held is not None
    assert "waiting 60 s for its end" in caplog.text
    held.close()


def test_what_slurm_starts_again_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server may never hear that the job's node has crashed."""
    crashed = Holder(tmp_path, job="17")
    try:
        monkeypatch.setenv("SLURM_JOB_ID", "18")
        with pytest.raises(UserError, match="slurm job 17, process"):
            lock_run(tmp_path)
        # A link of the same chain has a number of its own.
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
        held = lock_run(tmp_path)
        assert held is not None
        assert "of this same slurm job" in caplog.text
        held.close()
    finally:
        crashed.kill()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    with caplog.at_level(logging.INFO):
        assert lock_run(tmp_path) is None
    assert "no locks here (Function not implemented)" in caplog.text


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--logs: cannot write .*gone"):
        lock_run(tmp_path / "gone")
