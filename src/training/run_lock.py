"""That no two processes train one run at a time: they would write over each other's checkpoints, and go on from them."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from training.errors import UserError

NAME = ".lock"
# A process that has just been asked to end may still be writing, and a server of NFS 4 keeps the lock of a node that has
# crashed for 90 s.
WAIT_SECONDS = 100.0
_POLL_SECONDS = 0.5


def lock_run(folder: Path) -> IO[str] | None:
    """Make this process the only one that trains the run, for as long as what is returned is open, and the process alive.

    The kernel gives the lock back when the process ends, however it does: nothing is left to be removed.

    Args:
        folder: of the run; a file .lock in it says who trains.

    Returns:
        The open file, to be closed; None where the file system knows no locks.

    Raises:
        UserError: another process trains the run, and does not end within WAIT_SECONDS.
    """
    try:
        file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the run goes on
    except OSError as error:
        raise UserError(f"--logs: cannot write {folder / NAME} ({error.strerror})") from None
    try:
        if not _takes(file) and not _takes_in_time(file, folder.name):
            return file
        file.truncate(0)
        file.write(json.dumps({"job": _job(), "host": socket.gethostname(), "process": os.getpid()}))
        file.flush()
    except OSError as error:
        file.close()
        logging.info(
            "%s: no locks here (%s): two jobs that train this run would not be noticed", folder, error.strerror
        )
        return None
    except UserError:
        file.close()
        raise
    return file


def _takes(file: IO[str]) -> bool:
    """Whether this process has the lock now. It is one of POSIX: a loader's process, being a fork, does not hold it on."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _takes_in_time(file: IO[str], name: str) -> bool:
    """Wait for the lock. False: whoever has it cannot be there any more, so that it is not needed."""
    logging.warning(
        "--name %s is being trained by %s: waiting %g s for its end", name, _in_words(_holder(file)), WAIT_SECONDS
    )
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        if _takes(file):
            return True
    holder = _holder(file)
    if _job() is None or holder.get("job") != _job():
        raise UserError(
            f"--name {name} is being trained by {_in_words(holder)}: give another --name, or end that one to go on from there"
        )
    # What slurm starts again has ended, if only with its node, which a server may never hear of.
    logging.warning("it was of this same slurm job: going on")
    return False


def _holder(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:  # it is about to write
        return {}
    return found if isinstance(found, dict) else {}


def _in_words(holder: dict[str, object]) -> str:
    job = "" if holder.get("job") is None else f"slurm job {holder['job']}, "
    return f"{job}process {holder.get('process', 'unknown')} on {holder.get('host', 'another host')}"


def _job() -> str | None:
    """The slurm job, the same for all links of a chain."""
    return os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
