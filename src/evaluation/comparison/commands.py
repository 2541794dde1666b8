"""The commands: which runs, which metrics, which files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.comparison.ablation import PAPER_TABLES, ablation_table
from evaluation.comparison.bands import X_LABELS, draw_curves
from evaluation.comparison.groups import group_runs, uneven, unfinished
from evaluation.comparison.metrics import HEADLINE_AGGREGATES
from evaluation.comparison.npn_time import time_table
from evaluation.comparison.runs import Run, open_runs
from evaluation.comparison.tables import Table, markdown, write_table
from evaluation.curves import is_headline
from evaluation.errors import UserError, one_line
from evaluation.figure_style import save_figure
from evaluation.records import series

CURVES = ("contrastive_loss", "global_loss", "temperature")
OPTIMIZATION_CURVES = ("contrastive_loss", "global_loss", "log_normalizer_gap")
SKIPPED_STEPS = 100


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `-` and `_` inside the name of a flag of a run mean the same."""
    parser = argparse.ArgumentParser(prog="figures.py", description="Figures and tables over several runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], list[Path]], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        added.add_argument(
            "runs", nargs="+", metavar="RUN", help="a run's folder, or a pattern such as 'logs/neuclip-*'"
        )
        added.add_argument("--out", type=Path, default=Path("figures"), metavar="FOLDER", help="where the files go")
        return added

    added = command("curves", _curves, "metrics over training, runs of several seeds as mean and band")
    _add_metrics(added)
    _add_x(added)
    added = command("optimization", _optimization, "curves and final metrics by how the NPN is optimized, or by a flag")
    _add_metrics(added)
    _add_x(added)
    _add_by(added, "npn_optimization unless given; repeat for combinations")
    added = command("npn-time", _npn_time, "time per step of the normalizers and of the whole, by the runs' own timers")
    added.add_argument("--skip-steps", type=int, default=SKIPPED_STEPS, metavar="N", help="leave out the first N steps")
    added = command("ablation", _ablation, "final metrics by the value of a flag, mean and deviation over seeds")
    _add_metrics(added)
    _add_by(added, "repeat for combinations")
    added.add_argument("--table", choices=PAPER_TABLES, help="--by the flag that the paper calls so")
    return _checked(parser.parse_args(argv))


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("--metric", "-m"),
        action="append",
        metavar="NAME",
        help="a number of metrics.jsonl or results.jsonl, or an aggregate of eval_results; repeat for more",
    )


def _add_x(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--x", choices=X_LABELS, default="samples", help="what metrics are drawn over")


def _add_by(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument(
        "--by", action="append", default=[], metavar="FLAG", help=f"a flag of the runs, or global_batch; {words}"
    )


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    if "by" in args:
        args.by = [flag.lstrip("-").replace("-", "_") for flag in args.by]
    if args.command == "optimization":
        args.by = args.by or ["npn_optimization"]
    if args.command == "ablation":
        if bool(args.by) == bool(args.table):
            raise UserError("ablation: give --by FLAG or --table NAME, one of the two.")
        args.by = args.by or [PAPER_TABLES[args.table]]
    if args.command == "npn-time" and args.skip_steps < 0:
        raise UserError(f"--skip-steps {args.skip_steps}: give 0 or more.")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder.")
    return args


def _curves(args: argparse.Namespace) -> list[Path]:
    runs = open_runs(args.runs)
    groups, notes = group_runs(runs)
    metrics = _metrics(args.metric, runs, CURVES, fewest=2)
    figure = draw_curves(groups, metrics, args.x)
    _tell([*notes, *unfinished(runs)])
    return save_figure(figure, _folder(args.out), "curves")


def _optimization(args: argparse.Namespace) -> list[Path]:
    runs = open_runs(args.runs)
    groups, notes = group_runs(runs, args.by)
    figure = draw_curves(groups, _metrics(args.metric, runs, OPTIMIZATION_CURVES, fewest=2), args.x)
    final_metrics = _metrics(args.metric, runs, OPTIMIZATION_CURVES)
    table = ablation_table(groups, args.by, final_metrics)
    _tell([*notes, *unfinished(runs), *uneven(groups, final_metrics)])
    name = "optimization" if args.by == ["npn_optimization"] else "optimization-" + "-".join(args.by)
    return [*save_figure(figure, _folder(args.out), name), *_show(table, args.out, name)]


def _npn_time(args: argparse.Namespace) -> list[Path]:
    return _show(time_table(open_runs(args.runs), args.skip_steps), args.out, "npn-time")


def _ablation(args: argparse.Namespace) -> list[Path]:
    runs = open_runs(args.runs)
    groups, notes = group_runs(runs, args.by)
    metrics = _metrics(args.metric, runs, ())
    table = ablation_table(groups, args.by, metrics)
    _tell([*notes, *unfinished(runs), *uneven(groups, metrics)])
    return _show(table, args.out, "ablation-" + "-".join(args.by))


def _metrics(asked: list[str] | None, runs: Sequence[Run], training: Sequence[str], fewest: int = 1) -> list[str]:
    """The metrics asked for, or else validation's main ones and these of training, as far as a run has them.

    Args:
        fewest: evaluations that an aggregate must be known of in one of the runs.
    """
    told = [run.names() for run in runs]
    in_training, in_validation = (set().union(*names) for names in zip(*told))
    if asked:
        for name in asked:
            if not any(run.has(name) for run in runs):
                there = ", ".join(sorted((in_training | in_validation) - {"step", "samples", "epoch"}))
                raise UserError(f"--metric {name}: no run has it; there is {there}.")
        return list(dict.fromkeys(asked))
    headline = sorted(name for name in in_validation if is_headline(name))
    aggregates = [
        name
        for name in HEADLINE_AGGREGATES
        if any(len(series(run.validation, "epoch", name)[0]) >= fewest for run in runs)
    ]
    found = [name for name in (*headline, *aggregates, *training) if any(run.has(name) for run in runs)]
    if not found:
        raise UserError("the runs have no validation metric yet: give --metric NAME, such as contrastive_loss.")
    return found


def _show(table: Table, folder: Path, name: str) -> list[Path]:
    print(markdown(table))
    return write_table(table, _folder(folder), name)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line tool; returns the exit status. A user's mistake is one line on stderr and status 2."""
    out = "--out"
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        out = args.out
        written = args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # Not every OSError knows its file, or has a number: a full disk, or what a library raises.
        path, reason = error.filename or out, error.strerror or one_line(error)
        print(f"error: {path} cannot be written ({reason}); give another --out FOLDER.", file=sys.stderr)
        return 2
    print("wrote " + ", ".join(map(str, written)))
    return 0
