"""The flags of every builder."""

import argparse
import os
from pathlib import Path

from . import BuildError


def add_flags(parser: argparse.ArgumentParser, out: Path | None = None) -> None:
    """Add the flags that every builder has; --out has to be given where it has no default."""
    parser.add_argument("--out", type=Path, required=out is None, default=out, help="folder to make")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels, 16 to 1024")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="rendering processes")
    parser.add_argument("--limit", type=int, default=None, help="build from about this many drawings only, for a test")


def check_flags(args: argparse.Namespace) -> None:
    """Check the values of the flags that every builder has.

    Raises:
        BuildError: a value makes no sense.
    """
    if not 16 <= args.size <= 1024:
        raise BuildError(f"--size {args.size} is out of range; use 16 to 1024 pixels")
    for flag, value in (
        ("--samples-per-shard", args.samples_per_shard),
        ("--workers", args.workers),
        ("--limit", args.limit),
    ):
        if value is not None and value < 1:
            raise BuildError(f"{flag} {value} is out of range; use 1 or more")
