#!/usr/bin/env python3
"""Evaluate a run: numbers with their chance levels, curves, and a gallery of searches, written into the run's folder.

    python src/evaluation/main.py --train_output_dir logs/NAME --pairs 'data/test/{00000..00001}.tar' \
        --zeroshot data/zeroshot --queries data/queries.json --compare logs/A logs/B
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script, Python puts this folder first on the path; its modules would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch

from evaluation.curves import plot_curves
from evaluation.datasets import PairDataset, open_classification
from evaluation.errors import UserError
from evaluation.features import PairFeatures
from evaluation.gallery_picture import draw_gallery
from evaluation.report import Result, print_table, write_report
from evaluation.run_folder import LoadedModel, RunFolder
from evaluation.search import Query, nearest_images, read_query_file
from evaluation.suite import Measured, Setting, encode_queries, measure_classification, measure_pairs

MOST_QUERIES = 8


class Evaluated(NamedTuple):
    """A run's result, with what the gallery needs of it (None without pairs)."""

    result: Result
    loaded: LoadedModel
    pairs: PairDataset | None
    features: PairFeatures | None


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags → namespace. `-` and `_` inside a flag's name mean the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_output_dir", required=True, metavar="DIR", help="the run's folder, logs/NAME")
    parser.add_argument("--epoch", type=int, help="evaluate epoch_N.pt, of compared runs too (default: the newest)")
    parser.add_argument("--iter", type=int, help="evaluate iter_S.pt instead of an epoch")
    parser.add_argument("--pairs", metavar="SHARDS", help="held-out pairs: webdataset shards; braces and :: expand")
    parser.add_argument("--zeroshot", metavar="DIR", help="classification set: clip_benchmark shards or class folders")
    parser.add_argument(
        "--queries", metavar="JSON", help='list of strings or {"text", "concept"}, the first 8 go into the gallery'
    )
    parser.add_argument("--query", nargs="+", default=[], metavar="TEXT", help="queries for the gallery, as text")
    parser.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="more runs, as columns and curves")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 …")
    parser.add_argument("--batch_size", type=int, default=256, help="samples encoded at a time")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    args = parser.parse_args([_underscored(argument) for argument in argv])
    if not args.pairs and not args.zeroshot:
        raise UserError("nothing to evaluate on: give --pairs SHARDS, --zeroshot DIR or both.")
    if (args.queries or args.query) and not args.pairs:
        raise UserError("--queries and --query search the images of --pairs: give --pairs SHARDS too.")
    if args.batch_size < 1 or args.workers < 0:
        raise UserError(f"--batch_size {args.batch_size} --workers {args.workers}: at least 1 and at least 0, please.")
    return args


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + separator + value


def chosen_device(name: str) -> torch.device:
    """The device of a name, `auto` being a GPU if there is one.

    Raises:
        UserError: for a device that torch does not know or this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu.") from None


def read_queries(path: str | None, texts: Sequence[str], pairs: PairDataset) -> list[Query]:
    """At most eight queries: from the command line, else from a file, else captions spread over the held-out pairs.

    Raises:
        UserError: if the file is missing or is no list of strings or of objects with a "text" (or "query").
    """
    if texts:
        return [Query(text) for text in texts][:MOST_QUERIES]
    if path is None:
        captions = list(dict.fromkeys(pairs.captions()))
        return [Query(text) for text in captions[:: -(-len(captions) // MOST_QUERIES)]]
    return read_query_file(path)[:MOST_QUERIES]


def evaluate_run(run: RunFolder, args: argparse.Namespace, device: torch.device) -> Evaluated:
    """Load one checkpoint of a run and measure it on the sets of the command line."""
    checkpoint = run.checkpoint(args.epoch, args.iter)
    loaded = run.load_model(args.epoch, args.iter, device)
    setting = Setting(device=device, batch_size=args.batch_size, workers=args.workers)
    measured, pairs, features = Measured(), None, None
    if args.pairs:
        pairs = PairDataset(args.pairs, loaded.preprocess_val, loaded.tokenizer)
        print(f"{run.name}, {checkpoint.label}: {pairs.total:,} pairs …", flush=True)
        part, features = measure_pairs(loaded.model, pairs, setting)
        measured.update(part)
    if args.zeroshot:
        source = open_classification(args.zeroshot, loaded.preprocess_val)
        print(f"{run.name}, {checkpoint.label}: {source.dataset.total:,} images to classify …", flush=True)
        measured.update(measure_classification(loaded.model, loaded.tokenizer, source, setting))
    result = Result(
        run=run.name,
        objective=run.objective,
        model=str(run.params["model"]),
        checkpoint={
            "file": f"checkpoints/{checkpoint.path.name}",
            "sha256": checkpoint.sha256(),
            "epoch": checkpoint.epoch,
            "iteration": checkpoint.iteration,
        },
        data={"pairs": args.pairs, "zeroshot": args.zeroshot},
        metrics=measured.metrics,
        chance=measured.chance,
        counts=measured.counts,
    )
    return Evaluated(result, loaded, pairs, features)


def write_gallery(path: Path, run: RunFolder, evaluated: Evaluated, queries: list[Query], label: str) -> None:
    """Search the pairs' images for the queries with the evaluated model, and draw what is found."""
    pairs, features = evaluated.pairs, evaluated.features
    assert pairs is not None
    assert features is not None
    setting = Setting(device=features.image_features.device)
    texts = [query.text for query in queries]
    query_features = encode_queries(evaluated.loaded.model, evaluated.loaded.tokenizer, texts, setting)
    hits = nearest_images(
        queries, query_features, features.image_features, lambda i: (pairs.caption(i), pairs.concept(i))
    )
    subtitle = " · ".join(filter(None, (run.objective, label, str(run.params["model"]))))
    draw_gallery(path, run.name, subtitle, queries, hits, pairs.image, pairs.total)


def evaluate(args: argparse.Namespace) -> None:
    """Do what the command line says: evaluate, write the files into the run's folder, print the table."""
    run = RunFolder(args.train_output_dir)
    others = [RunFolder(path) for path in args.compare]
    others = [other for other in others if other.path.resolve() != run.path.resolve()]
    for each in (run, *others):  # a missing checkpoint is reported before anything is computed
        each.checkpoint(args.epoch, args.iter)
    device = chosen_device(args.device)
    queries = read_queries(args.queries, args.query, PairDataset(args.pairs)) if args.pairs else []
    evaluated = evaluate_run(run, args, device)
    results = [evaluated.result, *(evaluate_run(other, args, device).result for other in others)]
    written = write_report(run.path, results)
    plot_curves({each.name: each.path for each in (run, *others)}, run.path / "curves.png")
    written.append(run.path / "curves.png")
    if queries:
        label = run.checkpoint(args.epoch, args.iter).label
        write_gallery(run.path / "gallery.png", run, evaluated, queries, label)
        written.append(run.path / "gallery.png")
    print()
    print_table(results)
    print("wrote " + ", ".join(map(str, written)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line tool; returns the exit status. A user's mistake is one line on stderr and status 2."""
    try:
        evaluate(parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        # From a loader process the message arrives under that process's traceback: the last line is ours.
        message = str(error).strip().splitlines()[-1].removeprefix("evaluation.errors.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
