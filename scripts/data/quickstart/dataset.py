"""From drawings to the finished folder: choose, render, split, shuffle, write."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from building import BuildError
from building.layouts import write_classification, write_pairs
from building.names import concept_key, shared_names, stable_hash
from building.rendering import Picture
from building.shards import write_json

from . import BUILDER_VERSION
from .captions import caption
from .names import is_held_out
from .queries import choose_queries
from .rendering import Job, render_all
from .sources import SOURCES, Drawing, list_drawings, package_versions

SHUFFLE_SEED = 0
IMAGES_PER_CLASS = 2  # a held-out concept with fewer pictures is no class; with 3 only about a hundred would be left
TEMPLATES = ("{c} icon", "{c}, outline icon", "{c}, filled icon", "{c}, bold icon", "{c} emoji")


@dataclass(frozen=True)
class Options:
    """What decides the files' content: picture side in pixels, samples per shard, number of drawings (None: all)."""

    size: int
    samples_per_shard: int
    limit: int | None


@dataclass(frozen=True)
class Sample:
    """One image-text pair. `concept` is the one name shared by all samples of a concept, in both spellings' stead."""

    png: bytes
    caption: str
    concept: str
    source: str
    style: str


def build(folder: Path, options: Options, workers: int) -> dict:
    """Build the data set into an existing empty folder.

    Args:
        folder: gets train/, test/, zeroshot/, manifest.json and queries.json.
        options: what to build; equal options and packages give equal bytes.
        workers: rendering processes; they do not change the result.
    Returns:
        The manifest.
    Raises:
        BuildError: packages are missing, or `options.limit` leaves nothing to train or to test on.
    """
    samples, dropped = collect_samples(list_drawings(), options, workers)
    train = [sample for sample in samples if not is_held_out(concept_key(sample.concept))]
    test = [sample for sample in samples if is_held_out(concept_key(sample.concept))]
    classes = zeroshot_classes(test)
    if not train or not classes:
        raise BuildError(f"--limit {options.limit} leaves no concept to train on or to hold out; use a larger --limit")
    for name, split in (("train", train), ("test", test)):
        random.Random(SHUFFLE_SEED).shuffle(split)
        members = (_members(key, sample) for key, sample in enumerate(split))
        write_pairs(folder / name, members, len(split), options.samples_per_shard)
    write_zeroshot(folder / "zeroshot", test, classes, options.samples_per_shard)
    write_json(folder / "queries.json", choose_queries(train, test))
    manifest = describe(options, train, test, classes, dropped)
    write_json(folder / "manifest.json", manifest)
    return manifest


def collect_samples(drawings: Sequence[Drawing], options: Options, workers: int) -> tuple[list[Sample], dict[str, int]]:
    """Render drawings and keep one sample of every picture that shows something.

    Returns:
        The samples in the order of the drawings, and how many were dropped as "blank" and as "duplicate_pixels".
    """
    if options.limit is not None:
        drawings = _whole_concepts(drawings, options.limit)
    pictures = render_all([Job(drawing.path, options.size) for drawing in drawings], workers)
    shown = [(drawing, picture) for drawing, picture in zip(drawings, pictures) if picture is not None]
    kept = _without_duplicates(shown)
    concepts = shared_names(drawing.name for drawing, _ in kept)
    samples = [
        Sample(picture.png, caption(drawing), concepts[concept_key(drawing.name)], drawing.source, drawing.style)
        for drawing, picture in kept
    ]
    return samples, {"blank": len(drawings) - len(shown), "duplicate_pixels": len(shown) - len(kept)}


def _whole_concepts(drawings: Sequence[Drawing], limit: int) -> list[Drawing]:
    """Take about `limit` drawings as whole concepts in a stable random order, so that a small set is a fair sample."""
    counts = Counter(concept_key(drawing.name) for drawing in drawings)
    chosen: set[str] = set()
    total = 0
    for key in sorted(counts, key=lambda key: stable_hash(f"limit {key}")):
        if total >= limit:
            break
        chosen.add(key)
        total += counts[key]
    return [drawing for drawing in drawings if concept_key(drawing.name) in chosen]


def _without_duplicates(shown: Sequence[tuple[Drawing, Picture]]) -> list[tuple[Drawing, Picture]]:
    """Keep one drawing of those with equal pixels, under its commonest name: icon sets keep old names as copies."""
    counts = Counter(concept_key(drawing.name) for drawing, _ in shown)
    best: dict[str, tuple[int, int, int]] = {}
    for index, (drawing, picture) in enumerate(shown):
        rank = (-counts[concept_key(drawing.name)], len(drawing.name), index)
        best[picture.digest] = min(best.get(picture.digest, rank), rank)
    kept = {index for _, _, index in best.values()}
    return [pair for index, pair in enumerate(shown) if index in kept]


def zeroshot_classes(test: Sequence[Sample]) -> list[str]:
    """Name the held-out concepts with enough pictures to be a class, in alphabetical order."""
    counts = Counter(sample.concept for sample in test)
    return sorted(concept for concept, count in counts.items() if count >= IMAGES_PER_CLASS)


def _members(key: int, sample: Sample) -> dict[str, bytes]:
    facts = {
        "key": key,
        "concept": sample.concept,
        "source": sample.source,
        "style": sample.style,
        "license": SOURCES[sample.source].license,
    }
    return {
        "png": sample.png,
        "txt": sample.caption.encode(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def write_zeroshot(folder: Path, test: Sequence[Sample], classes: Sequence[str], per_shard: int) -> None:
    """Write the held-out classes in clip_benchmark's webdataset layout for classification."""
    known = set(classes)
    pictures = [(sample.png, sample.concept) for sample in test if sample.concept in known]
    write_classification(folder, classes, TEMPLATES, pictures, len(pictures), per_shard)


def describe(
    options: Options, train: Sequence[Sample], test: Sequence[Sample], classes: Sequence[str], dropped: dict[str, int]
) -> dict:
    """Put together the manifest: what is in the folder, what it was made of, and what guessing would score."""
    return {
        "builder_version": BUILDER_VERSION,
        "options": vars(options),
        "packages": package_versions(),
        "sources": {
            name: {"title": s.title, "license": s.license, "attribution": s.attribution, "url": s.url}
            for name, s in SOURCES.items()
        },
        "dropped": dropped,
        "splits": {"train": _count(train), "test": _count(test)},
        "zeroshot": {"classes": len(classes), "images": sum(sample.concept in set(classes) for sample in test)},
        "chance": {
            "zeroshot_top1": 1 / len(classes),
            **{f"retrieval_recall@{k}": min(1.0, k / len(test)) for k in (1, 5, 10)},
        },
    }


def _count(samples: Sequence[Sample]) -> dict:
    captions = Counter(sample.caption for sample in samples)
    return {
        "samples": len(samples),
        "concepts": len({sample.concept for sample in samples}),
        "distinct_captions": len(captions),
        "samples_with_repeated_caption": sum(count for count in captions.values() if count > 1),
        "samples_by_source": dict(sorted(Counter(sample.source for sample in samples).items())),
    }
