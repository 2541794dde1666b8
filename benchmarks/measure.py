"""What the benchmarks share: timing on the device's own clock, medians with their spread, ranks, tables and JSON.

Run a benchmark alone (`--ranks 2` starts gloo ranks on this machine, or NCCL ranks on its GPUs), or let srun or torchrun start
it once per rank: then the ranks are theirs. Rank 0 prints a Markdown table and, with --json, writes every number.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from training import distributed
from training.distributed import World

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing, in the unit they were made in.

    Attributes:
        median, lower, upper: the middle one and the quartiles.
        count: how many there were.
    """

    median: float
    lower: float
    upper: float
    count: int

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.lower:{spec}} – {self.upper:{spec}})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of fewer than two values the one value three times."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], len(values))
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper, len(values))


class Stopwatch:
    """Times named parts of a repeated program. On a GPU by events in its stream, so that nothing waits in between.

    Parts may follow each other or repeat within one round; the times of a part within a round are added.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.rounds: list[dict[str, list[tuple[Any, Any]]]] = []

    def next_round(self) -> None:
        """What follows belongs to a new repetition."""
        self.rounds.append({})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times its body as `name`, within the present round."""
        begin = self._mark()
        yield
        self.rounds[-1].setdefault(name, []).append((begin, self._mark()))

    def milliseconds(self) -> dict[str, list[float]]:
        """For each part its time in each round where it occurs. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for parts in self.rounds:
            for name, marks in parts.items():
                found.setdefault(name, []).append(sum(self._between(*pair) for pair in marks))
        return found

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.on_gpu else 1000.0 * (end - begin)


def add_common_arguments(parser: ArgumentParser) -> None:
    """--device, --ranks, --threads, --repeats, --warmup, --json."""
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs if there are any")
    add("--ranks", type=int, default=1, help="processes to start here; none of it under srun or torchrun")
    add("--threads", type=int, help="threads of each rank on the CPU; the cores shared out unless given")
    add("--repeats", type=int, default=20, help="repetitions that count")
    add("--warmup", type=int, default=3, help="repetitions before those")
    add("--json", type=Path, help="file for every number")


def on_ranks(function: Callable[[World, Namespace], T], args: Namespace) -> list[T] | None:
    """Call `function(world, args)` on every rank.

    Args:
        function: at the top level of a file; what it returns must be picklable.

    Returns:
        The results in rank order; None on a rank that srun or torchrun started and that is not rank 0.
    """
    if distributed.environment()[2] > 1:
        world, result = _in_group(function, args)
        results = [None] * world.size
        torch.distributed.all_gather_object(results, result)
        distributed.disconnect()
        return results if world.is_main else None
    if args.ranks == 1:
        return [_in_group(function, args)[1]]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=args.ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    results = elastic_launch(config, _launched)(function, args)
    return [results[rank] for rank in range(args.ranks)]


def _launched(function: Callable[[World, Namespace], T], args: Namespace) -> T:
    result = _in_group(function, args)[1]
    distributed.disconnect()
    return result


def _in_group(function: Callable[[World, Namespace], T], args: Namespace) -> tuple[World, T]:
    _, _, size = distributed.environment()
    torch.set_num_threads(args.threads or max(1, len(os.sched_getaffinity(0)) // max(1, size)))
    world = distributed.connect(args.device, None, "env://", 1800)
    return world, function(world, args)


def machine(world_device: torch.device) -> dict[str, Any]:
    """What has to stand beside every number: device, versions, threads."""
    on_gpu = world_device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world_device) if on_gpu else _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write all numbers, if a file was asked for; dataclasses within become objects."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1, default=asdict) + "\n", encoding="utf-8")
