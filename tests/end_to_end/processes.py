"""Ranks of real runs that can be killed, signalled and started again within a second.

Each rank is a process forked from a server that has imported everything and done nothing else, so a run starts without the
seconds that importing takes; to the operating system, to gloo and to the loader's workers it is a process like any other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from end_to_end.runs import LAUNCHER_VARIABLES, free_port

_CONTEXT = multiprocessing.get_context("forkserver")
# What else a first training step imports: compilers, optimizers, a picture's formats.
_LATE = ["torch._dynamo", "torch.distributed.optim", "PIL.JpegImagePlugin", "PIL.PngImagePlugin"]
_CONTEXT.set_forkserver_preload(["torch", "open_clip", "webdataset", "training.main", *_LATE])
STARTING = 120.0


def start_server() -> None:
    """Until ranks can be forked without delay."""
    first = _CONTEXT.Process(target=int)
    first.start()
    first.join()


class Run:
    """A run of training on some ranks of this machine.

    Args:
        flags: of main.py.
        output: where every rank's standard output and error go, appended, as rank_0.txt, ….
        prepare: called in each rank before it begins; a function, or a partial of one, that can be imported.
        variables: further environment variables.
    """

    def __init__(
        self,
        ranks: int,
        flags: list[str],
        output: Path,
        prepare: Callable[[], None] | None = None,
        **variables: str,
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.output = output
        self.ranks: list[BaseProcess] = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            file = output / f"rank_{rank}.txt"
            process = _CONTEXT.Process(target=_train, args=(flags, file, {**place, **meeting, **variables}, prepare))
            process.start()
            self.ranks.append(process)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, to all if none is named; not to those that have ended."""
        for rank in ranks or range(len(self.ranks)):
            process = self.ranks[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def signal_groups(self, number: int) -> None:
        """Send a signal to all ranks and every process they have started, as a batch system does."""
        for process in self.ranks:
            if process.is_alive() and process.pid is not None:
                os.killpg(process.pid, number)

    def kill(self) -> None:
        """kill -9 of all ranks, one right after the other."""
        self.signal(signal.SIGKILL)
        self.wait(30)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses once all have ended, None for those that have not after `seconds`."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    @property
    def is_running(self) -> bool:
        """Whether all ranks are alive."""
        return all(process.is_alive() for process in self.ranks)

    def until(self, path: Path, text: str, count: int = 1, seconds: float = STARTING) -> bool:
        """Wait until a file holds a text so often. False if a rank ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            is_running = self.is_running
            if path.exists() and path.read_text(errors="replace").count(text) >= count:
                return True
            if not is_running:
                return False
            time.sleep(0.01)
        raise TimeoutError(f"{path} never held {text!r}: {self.said_by_all()}")

    def until_there(self, path: Path) -> bool:
        """Wait until there is a file. False if a rank ended before."""
        return self.until(path, "", 0)

    def said(self, rank: int) -> str:
        """What a rank has printed."""
        return self.file(rank).read_text(errors="replace")

    def file(self, rank: int) -> Path:
        """Where a rank prints to."""
        return self.output / f"rank_{rank}.txt"

    def said_by_all(self) -> str:
        """The end of what each rank has printed."""
        return "\n".join(f"rank {rank}:\n{self.said(rank)[-3000:]}" for rank in range(len(self.ranks)))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _train(flags: list[str], output: Path, variables: dict[str, str], prepare: Callable[[], None] | None) -> None:
    os.setpgid(0, 0)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # A forked server's children would start theirs, the loader's workers, through it too.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    from training.main import main

    if prepare is not None:
        prepare()
    status = main(flags)
    sys.stdout.flush()
    sys.stderr.flush()
    # As the interpreter of a rank would, but without the forked server's own leftovers.
    os._exit(status)
