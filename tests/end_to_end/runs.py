"""Runs of training as processes of their own, and what they leave behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

ROOT = Path(__file__).resolve().parents[2]
MAIN = ROOT / "src" / "training" / "main.py"
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"),
)
SECONDS = 240


def clean_environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, for processes that share few cores."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    few = {
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONFAULTHANDLER": "1",
    }
    return {**kept, **few}


def free_port() -> int:
    """A port that nobody listens on, another one at every call, also in the processes that run tests beside this one.

    It lies below those that the system gives to outgoing connections: one of these may take a port between its choice here
    and its use there.
    """
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port is left")


def _own_ports() -> Iterator[int]:
    beside = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    first = 11000 + 2000 * beside
    # Two runs of the suite on one machine begin at different places.
    return itertools.islice(itertools.cycle(range(first, first + 2000)), os.getpid() % 2000, None)


_PORTS = _own_ports()


def run_python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these words; standard output and error come back as text."""
    return run_together([list(words)], [variables])[0]


def run_ranks(ranks: int, flags: list[str], spelling: str = "torchrun") -> list[subprocess.CompletedProcess[str]]:
    """Train on some ranks of this machine, each told its place by the variables that torchrun or srun would set."""
    names = {
        "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
        "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    }[spelling]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [dict(zip(names, map(str, (rank, rank, ranks)))) for rank in range(ranks)]
    command = ["-u", str(MAIN), *flags]
    return run_together([command] * ranks, [{**place, **meeting} if ranks > 1 else {} for place in places])


def run_together(commands: list[list[str]], variables: list[dict[str, str]]) -> list[subprocess.CompletedProcess[str]]:
    """Start all commands, wait for all.

    Raises:
        AssertionError: one has outlived SECONDS; with what all of them said, and where their threads were.
    """
    with contextlib.ExitStack() as files:
        # Files, not pipes: a process whose pipe nobody empties would hold up the others.
        outputs = [tuple(files.enter_context(tempfile.TemporaryFile()) for _ in range(2)) for _ in commands]
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env={**clean_environment(), **own},
                stdout=out,
                stderr=error,
                start_new_session=True,
            )
            for command, own, (out, error) in zip(commands, variables, outputs)
        ]
        late = not _all_end(processes)
        said = [tuple(_content(file) for file in both) for both in outputs]
    assert not late, "\n".join(f"process {i}: {out}{error}" for i, (out, error) in enumerate(said))
    return [
        subprocess.CompletedProcess(command, process.returncode, *output)
        for command, process, output in zip(commands, processes, said)
    ]


def _all_end(processes: list[subprocess.Popen[bytes]]) -> bool:
    """Whether all end by themselves in time; what is left is ended, with all that it has started."""
    end = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    finally:
        for number in (signal.SIGABRT, signal.SIGKILL):  # at the first, faulthandler tells where the threads are
            left = [process for process in processes if process.poll() is None]
            for process in left:
                os.killpg(process.pid, number)
            if left:
                time.sleep(2)
    return True


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without the leniency of Python's reader towards NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}, which is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    """A checkpoint, read as a stranger would."""
    return torch.load(path, map_location="cpu", weights_only=True)


def flat_tensors(content: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its place in it; numbers come as tensors, so that they are compared as well."""
    if isinstance(content, torch.Tensor):
        return {prefix: content}
    if isinstance(content, bool | int | float):
        return {prefix: torch.tensor(content)}
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    return {place: leaf for name, part in items for place, leaf in flat_tensors(part, f"{prefix}/{name}").items()}
