#!/usr/bin/env python3
"""Run the study of docs/results.md, or a part of it; what is finished is not done again.

    pip install -r requirements-training.txt -r requirements-study.txt
    python scripts/data/build_study.py --out data/study
    python scripts/study/run.py all --data data/study --logs logs/study --out results/study

Parts, each of which needs those before it: tune, compare, ablate, explain, measure, report.

What is published of our runs lies in docs/study, without checkpoints; the part `publish` has copied it there. `report --logs
docs/study` draws tables and figures of it; after `cp -r docs/study logs/study` the other parts take those runs for finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")]

from evaluation.errors import UserError
from evaluation.whole_files import write_whole
from study.errors import StudyError
from study.lanes import Job, gpus, lanes_of_this_machine, work_off
from study.measure import is_measured, is_record
from study.records import publish
from study.report import CHOICES, write_figures, write_report
from study.runs import SEEDS, Case, Choice, Run, Setup, ablation_runs, comparison_runs, memory_runs, visits_runs
from study.training import is_finished, train_all
from study.tuning import Tried, tune

PARTS = ("tune", "compare", "ablate", "explain", "measure", "report")
# Runs that are there, nothing of the data, is what these need.
ON_RECORDS = ("report", "publish")
SETS = ("train", "retrieval_set", "retrieval_combo", "retrieval_concept", "zeroshot", "zeroshot_concept")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags → namespace.

    Raises:
        StudyError: a value that makes no sense, or data that is not there.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("all", *PARTS, "publish"))
    parser.add_argument("--data", type=Path, default=Path("data/study"), help="what build_study.py has made")
    parser.add_argument("--logs", type=Path, default=Path("logs/study"), help="where the runs' folders go")
    parser.add_argument("--out", type=Path, default=Path("results/study"), help="where tables and figures go")
    parser.add_argument(
        "--records", type=Path, default=Path("docs/study"), help="where publish copies figures and flags"
    )
    parser.add_argument("--pairs", type=int, default=100_000, help="training pairs, in whole shards")
    parser.add_argument("--epochs", type=int, default=4, help="of the runs that are compared")
    parser.add_argument("--short-epochs", type=int, default=2, help="of tuning and of the ablations")
    parser.add_argument("--lanes", type=int, help="trainings side by side (default: one per GPU, else one per core)")
    args = parser.parse_args(argv)
    for name in ("pairs", "epochs", "short_epochs", "lanes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise StudyError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    missing = [name for name in SETS if not (args.data / name).is_dir()]
    if missing and args.part not in ON_RECORDS:
        raise StudyError(
            f"--data {args.data} has no {', '.join(missing)}: run scripts/data/build_study.py --out {args.data}"
        )
    for name in ("data", "logs", "out", "records"):
        setattr(args, name, getattr(args, name).absolute())
    return args


def run_part(part: str, setup: Setup, args: argparse.Namespace, lanes: int) -> None:
    """Do one part of the study."""
    train = partial(train_all, logs=setup.logs, lanes=lanes)
    if part == "tune":
        _write_choices(setup, tune(setup, train))
    elif part == "compare":
        train(comparison_runs(setup, read_choices(setup)))
    elif part == "ablate":
        train(ablation_runs(setup, read_choices(setup)))
    elif part == "explain":
        runs = [*memory_runs(setup, read_choices(setup)), *visits_runs(setup, read_choices(setup))]
        train(sorted(runs, key=lambda run: run.flags["seed"]))
    elif part == "measure":
        measure(setup, read_choices(setup), lanes)
    elif part == "publish":
        print(f"{len(publish(setup, args.records))} runs in {args.records}")
    else:
        write_report(setup.logs, read_choices(setup), args.out)
        write_figures(setup.logs, args.out)


def measure(setup: Setup, choices: dict[Case, Choice], lanes: int) -> None:
    """Measure all runs that are finished: on every held-out set, and of the first seed the error of the normalizers."""
    over_training = [*comparison_runs(setup, choices), *visits_runs(setup, choices)]
    all_runs = [*over_training, *ablation_runs(setup, choices), *memory_runs(setup, choices)]
    runs = [run for run in all_runs if is_finished(run, setup.logs)]
    jobs = [
        _job("study", run, "scripts/study/measure.py", str(setup.logs / run.name), f"--data={setup.data}", setup=setup)
        for run in runs
        if not is_measured(setup.logs / run.name)
    ]
    jobs += [
        _job(
            "error",
            run,
            "src/evaluation/normalizer_error.py",
            f"--train_output_dir={setup.logs / run.name}",
            "--workers=1",
            setup=setup,
        )
        for run in over_training
        if run in runs and run.flags["seed"] == str(SEEDS[0]) and not is_record(setup.logs / run.name)
    ]
    work_off(jobs, lanes)


def _job(what: str, run: Run, *words: str, setup: Setup) -> Job:
    return Job(f"{what} of {run.name}", words, setup.logs / "output" / f"{run.name}-{what}.txt")


def read_choices(setup: Setup) -> dict[Case, Choice]:
    """What tuning has chosen.

    Raises:
        StudyError: it has not.
    """
    path = setup.logs / CHOICES
    if not path.exists():
        raise StudyError(f"{path} is not there: run the part tune first")
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {(entry["method"], entry["batch_size"]): Choice(entry["lr"], entry["gamma"]) for entry in entries}


def _write_choices(setup: Setup, tried: dict[Case, Tried]) -> None:
    entries = [
        {
            "method": method,
            "batch_size": size,
            "lr": found.choice.lr,
            "gamma": found.choice.gamma,
            "scores": {f"{lr:g}": score for lr, score in found.rates.items()},
            "gamma_scores": {f"{gamma:g}": score for gamma, score in found.gammas.items()},
        }
        for (method, size), found in tried.items()
    ]
    write_whole(setup.logs / CHOICES, json.dumps(entries, indent=1) + "\n")
    for entry in entries:
        of = f"{entry['method']} at batch {entry['batch_size']}"
        print(
            f"{of}: lr {entry['lr']:g} of {entry['scores']}, γ {entry['gamma']} of {entry['gamma_scores']}", flush=True
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        args = parse_args(argv)
        precision = "amp_bf16" if gpus() else "fp32"
        setup = Setup(args.data, args.logs, args.epochs, args.short_epochs, args.pairs, precision)
        lanes = args.lanes or lanes_of_this_machine()
        for part in PARTS if args.part == "all" else (args.part,):
            print(f"==> {part}", flush=True)
            run_part(part, setup, args, lanes)
    except (StudyError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
