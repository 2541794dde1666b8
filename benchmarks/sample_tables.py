"""Memory and time per step of the per-sample tables of FastCLIP.

    PYTHONPATH=src python benchmarks/sample_tables.py --rows 1e6 1e8 1e9

For each number of samples a fresh process builds the table that training would build on one rank, all of it touched, and
looks up and replaces the rows of random global batches. Memory is what the process grew by (resident set), or what CUDA
allocated; nothing is extrapolated. A table that does not fit the free memory is reported as not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from neuclip.normalizers import PLACES, Placement, ShardedTable

COLUMNS = {"v0, v1, v3": 2, "v2": 8}
WARMUP_STEPS = 10


def measure(rows: int, columns: int, batch: int, steps: int, device: str, place: str) -> dict[str, Any]:
    """Build one table and time its steps in this process."""
    before = _resident_bytes()
    began = time.perf_counter()
    table = ShardedTable(rows, (0.5,) * columns, Placement(place)).to(device)
    _wait(device)
    built = time.perf_counter() - began
    grown = _resident_bytes() - before
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(rows, (batch,), generator=generator).to(device) for _ in range(WARMUP_STEPS + steps)]
    for keys in batches[:WARMUP_STEPS]:
        table.write(keys, table.read(keys) * 0.9)
    _wait(device)
    began = time.perf_counter()
    for keys in batches[WARMUP_STEPS:]:
        table.write(keys, table.read(keys) * 0.9)
    _wait(device)
    return {
        "rows": rows,
        "columns": columns,
        "global_batch": batch,
        "table_gib": rows * columns * 4 / 2**30,
        "resident_gib": grown / 2**30,
        "cuda_gib": torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0,
        "build_seconds": built,
        "step_microseconds": (time.perf_counter() - began) / steps * 1e6,
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _available_bytes() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _measure_in_a_fresh_process(args: argparse.Namespace, rows: int, columns: int) -> dict[str, Any] | None:
    # On a GPU the table is built in the host's memory, too, before it moves.
    if rows * columns * 4 > 0.95 * _available_bytes():
        return None
    words = ["--one", str(rows), str(columns), "--batch", str(args.batch), "--steps", str(args.steps)]
    command = [sys.executable, __file__, *words, "--device", args.device, "--table-device", args.table_device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e8, 1e9], help="numbers of samples")
    parser.add_argument("--batch", type=int, default=4096, help="global batch")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table-device", choices=PLACES, default="auto")
    parser.add_argument("--json", help="also write the measurements to this file, one object per line")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.batch, args.steps, args.device, args.table_device)))
        return
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, {machine}, {platform.machine()}, tables: {args.table_device}")
    print(f"{'version':<12}{'samples':>14}{'table GiB':>11}{'resident GiB':>14}{'build s':>9}{'step µs':>9}")
    for rows in map(int, args.rows):
        for version, columns in COLUMNS.items():
            found = _measure_in_a_fresh_process(args, rows, columns)
            if found is None:
                print(
                    f"{version:<12}{rows:>14,}{rows * columns * 4 / 2**30:>11.2f}   not measured: more than the free memory"
                )
                continue
            print(
                f"{version:<12}{rows:>14,}{found['table_gib']:>11.2f}{found['resident_gib']:>14.2f}"
                f"{found['build_seconds']:>9.2f}{found['step_microseconds']:>9.0f}",
                flush=True,
            )
            if args.json:
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"version": version, "machine": machine, **found}) + "\n")


if __name__ == "__main__":
    main()
