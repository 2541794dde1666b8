"""Runs of training as processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    return {**kept, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    """Start all commands, wait for all; a process that outlives its time is killed and the others with it."""
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**clean_environment(), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, own in zip(commands, variables)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its ranks at this, and leaves them behind when killed
        for process in processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *output)
        for command, process, output in zip(commands, processes, outputs)
    ]


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
