"""Peak memory and time of every objective's loss, forward and backward, over the global batch on one rank.

    PYTHONPATH=src python benchmarks/loss_memory.py --objectives openclip,siglip --sizes 4096,8192,16384 --chunk 1024

Each objective runs as it comes (`default`: openclip and siglip form all pairs at once, the others as many rows as fit
64 MiB) and with --loss-chunk-size. Every measurement has a process of its own and prints one line of JSON; one table follows.

Peak memory is what the steps need above features, objective and a small first step:
    cuda: torch.cuda.max_memory_allocated, that is bytes of tensors;
    cpu: the peak of the resident set (VmHWM of /proc/self/status, so Linux only), that is what the machine had to have.
A measurement that would not fit the free memory is skipped and says so. No number is ever computed from another one.
"""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Spread, Stopwatch, spread, write_json
from torch import Tensor

from neuclip import OBJECTIVES, Objective, RunShape, make_objective

SIZES = "4096,8192,16384,32768,65536"
FLOAT32_BYTES = 4
# Before anything is known of an objective: logits and their gradients in both directions, and something in between.
FIRST_GUESS_BLOCKS = 6
USABLE = 0.8  # of the free memory; others may want some
WARM_UP_SIZE = 64


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        chunk: --loss-chunk-size, or None without the flag.
        size: N, the global batch.
        dim: d, the width of the features.
        flags: further flags of the objectives.
        expected_bytes: the peak to be expected; where that is more than is free, nothing is run.
    """

    objective: str
    chunk: int | None
    size: int
    dim: int
    device: str
    steps: int
    flags: str
    expected_bytes: int


@dataclass(frozen=True)
class Result:
    """What a measurement found. Without a measurement both numbers are None and `note` says why.

    Attributes:
        peak_bytes: above the inputs, the most of all steps.
        seconds: of a step, median and quartiles.
    """

    peak_bytes: int | None = None
    seconds: Spread | None = None
    note: str = ""


def measure(case: Case) -> Result:
    """Run a case in this process, unless it is expected not to fit."""
    free = free_bytes(case.device)
    if case.expected_bytes > USABLE * free:
        return Result(note=f"skipped: expected {readable(case.expected_bytes)}, free {readable(free)}")
    stopwatch = Stopwatch(torch.device(case.device))
    try:
        # Libraries and threads are loaded by a first step; they are not the loss's.
        step(build(case, WARM_UP_SIZE), make_inputs(case, WARM_UP_SIZE))
        objective, inputs = build(case, case.size), make_inputs(case, case.size)
        meter = CudaPeak() if case.device.startswith("cuda") else ResidentPeak()
        for _ in range(case.steps):
            stopwatch.next_round()
            with stopwatch.part("step"):
                step(objective, inputs)
            meter.wait()
    except (MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return Result(note=f"failed: out of memory, {readable(free)} were free")
    return Result(meter.bytes(), spread([ms / 1000 for ms in stopwatch.milliseconds()["step"]]))


def build(case: Case, size: int) -> Objective:
    """The objective between two logging steps."""
    chunk = "" if case.chunk is None else f"--loss-chunk-size {case.chunk}"
    flags = f"--objective {case.objective} --data_size {size} {case.flags} {chunk}"
    objective = make_objective(flags, RunShape(case.dim, size, 1, steps_per_epoch=10, epochs=2)).to(case.device)
    objective.report = False
    objective.start_epoch(0)
    return objective


@dataclass
class Inputs:
    """Leaves of the graph: images and texts [N, d], logit_scale, logit_bias where there is one; and keys [N]."""

    leaves: list[Tensor]
    keys: Tensor


def make_inputs(case: Case, size: int) -> Inputs:
    cls = OBJECTIVES[case.objective]
    generator = torch.Generator().manual_seed(0)
    leaves = [F.normalize(torch.randn(size, case.dim, generator=generator), dim=1) for _ in range(2)]
    leaves.append(torch.tensor(1.0 / cls.initial_temperature))
    if cls.initial_logit_bias is not None:
        leaves.append(torch.tensor(cls.initial_logit_bias))
    return Inputs([leaf.to(case.device).requires_grad_() for leaf in leaves], torch.arange(size, device=case.device))


def step(objective: Objective, inputs: Inputs) -> None:
    """Forward and backward to the features, as within a training step."""
    for leaf in inputs.leaves:
        leaf.grad = None
    bias = inputs.leaves[3] if len(inputs.leaves) > 3 else None
    objective(*inputs.leaves[:3], bias, inputs.keys).loss.backward()


class CudaPeak:
    """Bytes of tensors on the GPU above those at the beginning."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


class ResidentPeak:
    """The peak of this process's resident set above what was resident at the beginning."""

    def __init__(self) -> None:
        # What malloc keeps of freed memory would be used again and hide a part of the peak.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
        self.before = self._status("VmHWM")

    def wait(self) -> None:
        """A step on the CPU is done when it returns."""

    def bytes(self) -> int:
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def free_bytes(device: str) -> int:
    """Memory that is free on the device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def expected_bytes(size: int, chunk: int | None, measured: Sequence[tuple[int, int]]) -> int:
    """Only to decide whether to run: the peak to be expected from those of smaller sizes, (size, bytes) in rising order.

    Two of them show how the peak grows, between linearly and quadratically; with one or none the worst is assumed.
    """
    if not measured:
        return FIRST_GUESS_BLOCKS * min(chunk or size, size) * size * FLOAT32_BYTES
    last_size, last_bytes = measured[-1]
    power = 2.0
    if len(measured) > 1:
        earlier_size, earlier_bytes = measured[-2]
        growth = math.log(max(last_bytes, 1) / max(earlier_bytes, 1)) / math.log(last_size / earlier_size)
        power = min(2.0, max(1.0, growth))
    return round(last_bytes * (size / last_size) ** power)


def in_a_process_of_its_own(case: Case) -> Result:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, case).result()
        except BrokenProcessPool:
            return Result(note="failed: the process was killed, as happens when memory runs out")


def run(args: Namespace) -> dict[tuple[str, int | None], dict[int, Result]]:
    """All measurements, by (objective, chunk) and size. Each is printed as a line of JSON when it is there."""
    results: dict[tuple[str, int | None], dict[int, Result]] = {}
    lines = []
    for objective in args.objectives:
        for chunk in (None, args.chunk):
            found = results.setdefault((objective, chunk), {})
            for size in args.sizes:
                measured = [(n, r.peak_bytes) for n, r in found.items() if r.peak_bytes is not None]
                expected = expected_bytes(size, chunk, measured)
                case = Case(objective, chunk, size, args.dim, args.device, args.steps, args.flags, expected)
                found[size] = in_a_process_of_its_own(case)
                # What was expected is no result, and not to be taken for one.
                asked = {name: value for name, value in asdict(case).items() if name != "expected_bytes"}
                line = {**asked, **asdict(found[size])}
                lines.append(line)
                print(json.dumps(line), flush=True)
    write_json(args.json, {"benchmark": "loss_memory", "torch": torch.__version__, "measurements": lines})
    return results


def readable(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def table(results: dict[tuple[str, int | None], dict[int, Result]], sizes: Sequence[int]) -> str:
    """Markdown, one row per objective with and without chunks: peak / seconds by size."""
    lines = [
        f"| objective | rows at a time | {' | '.join(f'N = {size}' for size in sizes)} |",
        f"| --- | --- |{' --- |' * len(sizes)}",
    ]
    for (objective, chunk), found in results.items():
        cells = []
        for size in sizes:
            result = found[size]
            if result.peak_bytes is None or result.seconds is None:
                cells.append(result.note)
            else:
                cells.append(f"{readable(result.peak_bytes)} / {result.seconds:.3g} s")
        lines.append(f"| {objective} | {chunk or 'default'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    names = ",".join(OBJECTIVES)
    parser.add_argument("--objectives", type=lambda text: text.split(","), default=names, help=f"some of {names}")
    parser.add_argument("--sizes", type=_numbers, default=SIZES, help="global batch sizes N")
    parser.add_argument("--chunk", type=int, default=1024, help="--loss-chunk-size of the chunked measurements")
    parser.add_argument("--dim", type=int, default=512, help="d, width of the features")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=3, help="steps per measurement")
    parser.add_argument("--json", type=Path, help="file for every number, next to the lines that are printed")
    parser.add_argument("--flags", default="", help="further flags for the objectives: --flags='--npn_num_protos 1024'")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.objectives) - set(OBJECTIVES))
    if unknown:
        parser.error(f"--objectives {','.join(unknown)}: choose from {names}")
    if min(args.sizes) < 2 or args.chunk < 1 or args.dim < 1 or args.steps < 1:
        parser.error("--sizes must be 2 or more, --chunk, --dim and --steps 1 or more")
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device cpu reads peaks from /proc, which only Linux has: use --device cuda")
    return args


def _numbers(text: str) -> list[int]:
    """Rising numbers from a list with commas."""
    return sorted({int(part) for part in text.split(",")})


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(f"# torch {torch.__version__}, {args.device}{threads}, d = {args.dim}", flush=True)
    results = run(args)
    print(f"\npeak memory above the inputs / seconds per step, median (quartiles), d = {args.dim}\n")
    print(table(results, args.sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
