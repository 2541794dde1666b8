"""Evaluation of one or more runs on held-out pairs and a classification set: numbers with chance levels, curves, a gallery."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evaluation.datasets import PairDataset, open_classification
from evaluation.errors import UserError
from evaluation.features import PairFeatures
from evaluation.held_out_digest import classification_digest, pairs_digest
from evaluation.ranks import Place
from evaluation.report import Result, print_table, write_report
from evaluation.run_folder import LoadedModel, RunFolder, Subject
from evaluation.search import Query, nearest_images, read_query_file
from evaluation.suite import Measured, Setting, encode_queries, measure_classification, measure_pairs
from evaluation.zero_shot import fill_template

MOST_QUERIES = 8


@dataclass(frozen=True)
class HeldOut:
    """What to measure on.

    Args:
        pairs: shards of image–text pairs, or None.
        zeroshot: the folder of a classification set, or None.
        queries: what the gallery searches the pairs' images for; empty without pairs.
        precision: the name of the towers' number format, for the report.
        digests: `pairs_sha256` and `zeroshot_sha256` of the sets there are.
    """

    pairs: str | None
    zeroshot: str | None
    queries: list[Query]
    precision: str
    digests: dict[str, str]


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
        UserError: for a set or a file of queries that cannot be used, or a template without {c}.
    """
    digests, found = {}, []
    if zeroshot:
        source = open_classification(zeroshot)
        try:
            for template in source.templates:
                fill_template(template, "")
        except UserError as error:
            raise UserError(f"--zeroshot {zeroshot}: {error}") from None
        digests["zeroshot_sha256"] = classification_digest(source)
    if pairs:
        opened_pairs = PairDataset(pairs)
        found = read_queries(query_file, queries, opened_pairs)
        digests["pairs_sha256"] = pairs_digest(opened_pairs)
    return HeldOut(pairs, zeroshot, found, precision, digests)


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
        data={"pairs": sets.pairs, "zeroshot": sets.zeroshot, **sets.digests},
        metrics=measured.metrics,
        chance=measured.chance,
        counts=measured.counts,
        precision=sets.precision,
    )
    return Evaluated(result, loaded, pairs, features)


def write_gallery(
    path: Path, run: RunFolder, evaluated: Evaluated, queries: list[Query], label: str, setting: Setting
) -> None:
    """Search the pairs' images for the queries with the evaluated model, and draw what is found.

    Raises:
        ImportError: without matplotlib.
        OSError: the picture cannot be written.
    """
    from evaluation.gallery_picture import draw_gallery

    pairs, features = evaluated.pairs, evaluated.features
    assert pairs is not None
    assert features is not None
    texts = [query.text for query in queries]
    # In the run's precision, as the images were encoded.
    query_features = encode_queries(evaluated.loaded.model, evaluated.loaded.tokenizer, texts, setting)
    hits = nearest_images(
        queries, query_features, features.image_features, lambda i: (pairs.caption(i), pairs.concept(i))
    )
    subtitle = " · ".join(filter(None, (run.objective, label, str(run.params["model"]))))
    draw_gallery(path, run.name, subtitle, queries, hits, pairs.image, pairs.total)


def write_files(
    sets: HeldOut, subjects: Sequence[Subject], evaluated: Evaluated, others: Sequence[Result], setting: Setting
) -> None:
    """The table on the terminal, then the report, the curves and the gallery into the first run's folder.

    Without matplotlib there are no pictures, which is told.

    Raises:
        UserError: a file cannot be written.
    """
    run, results = subjects[0].run, [evaluated.result, *others]
    print()
    print_table(results)
    sys.stdout.flush()
    try:
        written = write_report(run.path, results)
        written += _write_pictures(sets, subjects, evaluated, setting)
    except OSError as error:
        file = error.filename or run.path
        raise UserError(f"{file} cannot be written ({error.strerror or error}); free or mend it.") from None
    print("wrote " + ", ".join(map(str, written)), flush=True)


def _write_pictures(sets: HeldOut, subjects: Sequence[Subject], evaluated: Evaluated, setting: Setting) -> list[Path]:
    run = subjects[0].run
    try:
        from evaluation.curves import plot_curves
    except ModuleNotFoundError as error:
        print(f"note: no pictures, as {error.name} is not installed: pip install matplotlib")
        return []
    plot_curves({each.run.name: each.run.path for each in subjects}, run.path / "curves.png")
    if not sets.queries:
        return [run.path / "curves.png"]
    write_gallery(run.path / "gallery.png", run, evaluated, sets.queries, subjects[0].checkpoint.label, setting)
    return [run.path / "curves.png", run.path / "gallery.png"]
