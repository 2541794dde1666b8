#!/usr/bin/env python3
"""Evaluate a checkpoint of a run: on the tasks of DataComp, on held-out pairs, on a classification set.

    python src/evaluation/main.py --train_output_dir logs/NAME --epoch 24 --data_dir data/datacomp
    torchrun --nproc-per-node 8 -- src/evaluation/main.py --train_output_dir logs/NAME --epoch 24 --data_dir data/datacomp
    python src/evaluation/main.py --train_output_dir logs/NAME --pairs 'data/test/{00000..00001}.tar' \
        --zeroshot data/zeroshot --queries data/queries.json --compare logs/A logs/B

Status 0: evaluated, perhaps without the sets that are not there; 1: a task failed; 2: a mistake in the flags or files.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script, Python puts this folder first on the path; its modules would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation import precision
from evaluation.datacomp.run import Request, Suite
from evaluation.datacomp.selection import selected_tasks
from evaluation.errors import UserError, one_line
from evaluation.ranks import Place, SharedError, environment, joined
from evaluation.run_folder import LoadedModel, RunFolder, Subject
from evaluation.suite import Setting

if TYPE_CHECKING:
    from evaluation.held_out import HeldOut

LET_RANK_0_SPEAK = 3.0  # seconds


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags → namespace. `-` and `_` inside a flag's name mean the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_output_dir", required=True, metavar="DIR", help="the run's folder, logs/NAME")
    parser.add_argument("--epoch", type=int, help="evaluate epoch_N.pt, of compared runs too (default: the newest)")
    parser.add_argument("--iter", type=int, help="evaluate iter_S.pt instead of an epoch")
    parser.add_argument("--arch", metavar="MODEL", help="open_clip's name of the model (default: what params.txt says)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 …")
    parser.add_argument("--batch_size", type=int, default=256, help="samples encoded at a time by each rank")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each rank")
    parser.add_argument(
        "--precision", default="auto", choices=precision.NAMES, help="of the towers; auto: bf16 on GPUs that have it"
    )
    group = parser.add_argument_group("the tasks of DataComp")
    group.add_argument("--data_dir", metavar="DIR", help="folder of the sets, as src/evaluation/download.py makes it")
    group.add_argument("--tasks", metavar="LIST", help="keys, names or groups, with commas (default: all 40)")
    group.add_argument("--redo", action="store_true", help="measure finished tasks again")
    group = parser.add_argument_group("held-out pairs and a classification set")
    group.add_argument("--pairs", metavar="SHARDS", help="held-out pairs: webdataset shards; braces and :: expand")
    group.add_argument("--zeroshot", metavar="DIR", help="classification set: clip_benchmark shards or class folders")
    group.add_argument(
        "--queries", metavar="JSON", help='list of strings or {"text", "concept"}, the first 8 go into the gallery'
    )
    group.add_argument("--query", nargs="+", default=[], metavar="TEXT", help="queries for the gallery, as text")
    group.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="more runs, as columns and curves")
    args = parser.parse_args([_underscored(argument) for argument in argv])
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    held_out = bool(args.pairs or args.zeroshot)
    if not held_out and not args.data_dir:
        raise UserError("nothing to evaluate on: give --data_dir DIR, --pairs SHARDS or --zeroshot DIR.")
    if (args.queries or args.query) and not args.pairs:
        raise UserError("--queries and --query search the images of --pairs: give --pairs SHARDS too.")
    if (args.tasks is not None or args.redo) and not args.data_dir:
        raise UserError("--tasks and --redo are about the sets of --data_dir: give --data_dir DIR too.")
    if args.compare and not held_out:
        raise UserError("--compare goes with --pairs or --zeroshot; src/evaluation/compare.py tables DataComp results.")
    if args.batch_size < 1 or args.workers < 0:
        raise UserError(f"--batch_size {args.batch_size} --workers {args.workers}: at least 1 and at least 0, please.")


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + separator + value


def _subjects(args: argparse.Namespace, place: Place) -> list[Subject]:
    """The run and those to compare it with; a missing checkpoint is told before anything is computed."""

    def find() -> list[Subject]:
        runs = [RunFolder(args.train_output_dir, args.arch)]
        for path in args.compare:
            has_params = (Path(path) / "params.txt").is_file()
            runs.append(RunFolder(path, None if has_params else args.arch))
        different = {run.path.resolve(): run for run in reversed(runs)}
        runs = [run for run in runs if different[run.path.resolve()] is run]
        found = [(run, run.checkpoint(args.epoch, args.iter)) for run in runs]  # all, before the first is read
        return [Subject.of(run, checkpoint) for run, checkpoint in found]

    return place.from_main(find)


def _loaded(subject: Subject, place: Place) -> LoadedModel:
    loaded = place.together(lambda: subject.run.load_checkpoint(subject.checkpoint, place.device))
    place.from_main(subject.check_unchanged)
    return loaded


def _evaluate_held_out(
    sets: HeldOut, subjects: list[Subject], loaded: LoadedModel, setting: Setting, place: Place
) -> None:
    from evaluation.held_out import evaluate_run, write_files

    evaluated = evaluate_run(sets, subjects[0], loaded, setting, place)
    others = []
    for subject in subjects[1:]:
        other = _loaded(subject, place)
        others.append(evaluate_run(sets, subject, other, setting, place).result)
    place.from_main(lambda: write_files(sets, subjects, evaluated, others, setting))


def evaluate(args: argparse.Namespace, place: Place) -> int:
    """Do what the command line says, on this rank; returns the exit status."""
    tasks = place.together(lambda: selected_tasks(args.tasks))
    subjects = _subjects(args, place)
    chosen = precision.chosen_precision(args.precision, place.device)
    suite, plan, sets = None, None, None
    if args.pairs or args.zeroshot:
        from evaluation.held_out import opened

        sets = place.together(lambda: opened(args.pairs, args.zeroshot, args.queries, args.query, chosen.name))
    if args.data_dir:
        any_precision = args.precision == "auto"
        request = Request(subjects[0], tasks, Path(args.data_dir), chosen.name, any_precision, args.redo)
        suite = Suite(request, place)
        plan = suite.plan()
    setting = Setting(
        device=place.device,
        batch_size=args.batch_size,
        workers=args.workers,
        autocast_context=chosen.autocast_context,
        rank=place.rank,
        world_size=place.world_size,
        together=place.together,
    )
    failed: dict[str, str] = {}
    if sets is not None or (plan is not None and plan.to_do):
        loaded = _loaded(subjects[0], place)
        if sets is not None:
            _evaluate_held_out(sets, subjects, loaded, setting, place)
        if suite is not None and plan is not None:
            failed = suite.measure(plan, loaded, setting)
    return suite.finish(plan, failed) if suite is not None and plan is not None else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line tool; returns the exit status. A user's mistake is one line on stderr and status 2."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _mistake(error)
    try:
        with joined(args.device) as place:
            return evaluate(args, place)
    except SharedError as error:
        return _mistake(error)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _mistake(error: UserError) -> int:
    """One that every rank has found, or heard of: rank 0 speaks."""
    if environment()[0] == 0:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    elif not isinstance(error, SharedError):
        # The launcher ends all ranks at the first that ends, which must not be before rank 0 has spoken.
        time.sleep(LET_RANK_0_SPEAK)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
