"""Evaluation of one or more runs on held-out pairs and a classification set: numbers with chance levels, curves, a gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evaluation.curves import plot_curves
from evaluation.datasets import PairDataset, open_classification
from evaluation.features import PairFeatures
from evaluation.gallery_picture import draw_gallery
from evaluation.ranks import Place
from evaluation.report import Result, print_table, write_report
from evaluation.run_folder import LoadedModel, RunFolder, Subject
from evaluation.search import Query, nearest_images, read_query_file
from evaluation.suite import Measured, Setting, encode_queries, measure_classification, measure_pairs

MOST_QUERIES = 8


@dataclass(frozen=True)
class HeldOut:
    """What to measure on.

    Args:
        pairs: shards of image–text pairs, or None.
        zeroshot: the folder of a classification set, or None.
        queries: what the gallery searches the pairs' images for; empty without pairs.
        precision: the name of the towers' number format, for the report.
    """

    pairs: str | None
    zeroshot: str | None
    queries: list[Query]
    precision: str


class Evaluated(NamedTuple):
    """A run's result, with what the gallery needs of it (None without pairs)."""

    result: Result
    loaded: LoadedModel
    pairs: PairDataset | None
    features: PairFeatures | None


def opened(
    pairs: str | None, zeroshot: str | None, query_file: str | None, queries: Sequence[str], precision: str
) -> HeldOut:
    """The sets, opened once before any model is loaded, so that a mistake is known early.

    Raises:
        UserError: for a set or a file of queries that cannot be used.
    """
    if zeroshot:
        open_classification(zeroshot)
    found = read_queries(query_file, queries, PairDataset(pairs)) if pairs else []
    return HeldOut(pairs, zeroshot, found, precision)


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


def evaluate_run(sets: HeldOut, subject: Subject, loaded: LoadedModel, setting: Setting, place: Place) -> Evaluated:
    """Measure one checkpoint on the sets; all ranks together."""
    run, checkpoint, share = subject.run, subject.checkpoint, {"rank": place.rank, "world_size": place.world_size}
    measured, pairs, features = Measured(), None, None
    if sets.pairs:
        pattern = sets.pairs
        pairs = place.together(lambda: PairDataset(pattern, loaded.preprocess_val, loaded.tokenizer, **share))
        place.say(f"{run.name}, {checkpoint.label}: {pairs.total:,} pairs …")
        part, features = measure_pairs(loaded.model, pairs, setting)
        measured.update(part)
    if sets.zeroshot:
        folder = sets.zeroshot
        source = place.together(lambda: open_classification(folder, loaded.preprocess_val, **share))
        place.say(f"{run.name}, {checkpoint.label}: {source.dataset.total:,} images to classify …")
        measured.update(measure_classification(loaded.model, loaded.tokenizer, source, setting))
    result = Result(
        run=run.name,
        objective=run.objective,
        model=str(run.params["model"]),
        checkpoint={
            "file": f"checkpoints/{checkpoint.path.name}",
            "sha256": subject.sha256,
            "epoch": checkpoint.epoch,
            "iteration": checkpoint.iteration,
        },
        data={"pairs": sets.pairs, "zeroshot": sets.zeroshot},
        metrics=measured.metrics,
        chance=measured.chance,
        counts=measured.counts,
        precision=sets.precision,
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


def write_files(sets: HeldOut, subjects: Sequence[Subject], evaluated: Evaluated, others: Sequence[Result]) -> None:
    """The report, the curves and the gallery into the first run's folder, and the table on the terminal."""
    run, results = subjects[0].run, [evaluated.result, *others]
    written = write_report(run.path, results)
    plot_curves({each.run.name: each.run.path for each in subjects}, run.path / "curves.png")
    written.append(run.path / "curves.png")
    if sets.queries:
        write_gallery(run.path / "gallery.png", run, evaluated, sets.queries, subjects[0].checkpoint.label)
        written.append(run.path / "gallery.png")
    print()
    print_table(results)
    print("wrote " + ", ".join(map(str, written)), flush=True)
