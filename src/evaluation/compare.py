#!/usr/bin/env python3
"""Compare evaluated runs: a row per run, or per runs that differ in their seed only, with mean and standard deviation.

    python src/evaluation/compare.py logs/A logs/B 'logs/C-seed*' --out tables
    python src/evaluation/compare.py 'logs/*' --epoch 24 --tasks --group-by objective

Columns: DataComp's aggregates (eval_results/epoch_N_eval_results.jsonl) and the headlines of held-out sets (evaluation.json).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script, Python puts this folder first on the path; its modules would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence

from evaluation.comparison.evaluated import compared, expanded, read_run
from evaluation.comparison.evaluated_tables import terminal, write_tables
from evaluation.errors import UserError, one_line


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags → namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or patterns in quotes")
    parser.add_argument("--epoch", type=int, help="results of epoch N (default: the newest evaluated of each run)")
    parser.add_argument("--iter", type=int, help="results of iteration S instead of an epoch")
    parser.add_argument("--out", metavar="FOLDER", help="write comparison.md, comparison.csv and comparison.tex there")
    parser.add_argument("--tasks", action="store_true", help="a column for each of DataComp's 38 tasks too")
    parser.add_argument("--metrics", default="", metavar="LIST", help="more metrics of evaluation.json, with commas")
    parser.add_argument(
        "--group-by",
        default="seed",
        choices=("seed", "objective", "name-without-seed"),
        help="what makes runs one row: params.txt but for the seed, the objective, or the name but for seed…",
    )
    args = parser.parse_args(argv)
    if args.epoch is not None and args.iter is not None:
        raise UserError(f"--epoch {args.epoch} --iter {args.iter}: give one of them.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line tool; returns the exit status. A user's mistake is one line on stderr and status 2."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        runs = [read_run(folder, args.epoch, args.iter) for folder in expanded(args.runs)]
        metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
        comparison = compared(runs, args.group_by, with_tasks=args.tasks, metrics=metrics)
        print(terminal(comparison))
        if args.out:
            print("wrote " + ", ".join(map(str, write_tables(Path(args.out), comparison))))
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; choose another --out.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
