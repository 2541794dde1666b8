"""From the package to the finished folder: list, render, split, shuffle, write."""

import importlib.util
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from building import BuildError
from building.layouts import write_classification, write_pairs
from building.names import stable_hash
from building.rendering import worker_pool
from building.shards import Members, write_json

from .catalogue import Catalogue, emoji_in_all_sets, read_catalogue
from .duplicates import Sample, without_equal_pixels
from .limit import LEAST_FAMILIES_OF_CLASS, whole_concepts
from .manifest import describe
from .package import Package
from .rendering import Spool, render_icons
from .splits import Split, settle_combo

SHUFFLE_SEED = 0
PICTURES_PER_HELD_OUT_CLASS = 4
ICON_TEMPLATES = ("{c} icon", "{c}, outline icon", "{c}, filled icon", "{c}, bold icon", "{c}")
EMOJI_TEMPLATES = ("{c} emoji", "{c} icon", "{c}, color icon", "{c}")
_CODE_PACKAGES = {"resvg_py": "resvg-py", "PIL": "pillow", "numpy": "numpy"}


@dataclass(frozen=True)
class Options:
    """What decides the files' content.

    Attributes:
        size: side of the pictures in pixels.
        samples_per_shard: in all shards but the last of a split.
        limit: about how many icons to take; None: all.
        package: integrity string of the package's tarball.
    """

    size: int
    samples_per_shard: int
    limit: int | None
    package: str


@dataclass(frozen=True)
class Classes:
    """A classification set: its class names in alphabetical order, its prompts and its pictures."""

    names: list[str]
    templates: Sequence[str]
    samples: list[Sample]


def require_packages() -> None:
    """Check that everything needed is installed.

    Raises:
        BuildError: something is missing; the message holds the command that installs exactly that.
    """
    missing = [name for module, name in _CODE_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BuildError(f"missing packages: {', '.join(missing)}; install them with: pip install {' '.join(missing)}")


def build(folder: Path, package: Package, options: Options, workers: int) -> dict:
    """Build the data set into an existing empty folder.

    Args:
        folder: gets the splits, the classification sets and manifest.json.
        package: the icons.
        options: what to build; equal options and versions of the renderer give equal bytes.
        workers: rendering processes; they do not change the result.
    Returns:
        The manifest.
    Raises:
        BuildError: the package is damaged, or leaves a split empty.
    """
    catalogue = read_catalogue(package)
    icons = catalogue.icons if options.limit is None else whole_concepts(catalogue.icons, options.limit)
    # Unlinked at once, so that nothing has to be removed, whatever happens.
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        spool = Spool(file)
        with worker_pool(workers) as map_jobs:
            stored = render_icons(package, icons, options.size, map_jobs, spool)
        shown = [(icon, place) for icon, place in zip(icons, stored) if place is not None]
        samples = without_equal_pixels(shown)
        dropped = catalogue.dropped + Counter(blank=len(icons) - len(shown), equal_pixels=len(shown) - len(samples))
        splits = split_samples(samples)
        classifications = classification_sets(splits, catalogue)
        _check_not_empty(splits, classifications, options)
        _write(folder, splits, classifications, spool, options.samples_per_shard)
    counts = {name: (len(classes.names), len(classes.samples)) for name, classes in classifications.items()}
    manifest = describe(asdict(options), package.version, catalogue.sets, dropped, splits, counts)
    write_json(folder / "manifest.json", manifest)
    return manifest


def split_samples(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Distribute samples to the splits, shuffled.

    Returns:
        Samples by the split's folder: train, test_concept, test_combo, test_set, retrieval_concept, retrieval_combo,
        retrieval_set, and emoji/SET for every emoji set. A retrieval split is a part of a test split, with one picture of
        every concept, so that no caption is right for two pictures.
    """
    trained = {icon.key for icon, _ in samples if icon.split is Split.TRAIN}
    splits: dict[str, list[Sample]] = {str(split): [] for split in Split if split is not Split.EMOJI}
    for sample in samples:
        icon = sample[0]
        is_emoji = icon.split is Split.EMOJI
        name = f"emoji/{icon.prefix}" if is_emoji else str(settle_combo(icon.split, icon.key, trained))
        splits.setdefault(name, []).append(sample)
    for name, test in (
        ("retrieval_concept", Split.TEST_CONCEPT),
        ("retrieval_combo", Split.TEST_COMBO),
        ("retrieval_set", Split.TEST_SET),
    ):
        splits[name] = _one_of_each(splits[test])
    for split in splits.values():
        random.Random(SHUFFLE_SEED).shuffle(split)
    return splits


def _one_of_each(samples: Sequence[Sample]) -> list[Sample]:
    """Draw one picture of every concept, in a stable random way."""
    chosen: dict[str, Sample] = {}
    for sample in sorted(samples, key=lambda sample: stable_hash(f"pick {sample[0].prefix} {sample[0].name}")):
        chosen.setdefault(sample[0].key, sample)
    return list(chosen.values())


def classification_sets(splits: dict[str, list[Sample]], catalogue: Catalogue) -> dict[str, Classes]:
    """Choose classes and their pictures.

    Returns:
        Classes by folder. zeroshot: concepts that 12 or more families of the training split have, drawn in held-out styles;
        zeroshot_concept: held-out concepts with 4 or more pictures; zeroshot_emoji: emoji that all emoji sets draw.
    """
    families: dict[tuple[str, str], set[str]] = defaultdict(set)
    for icon, _ in splits[Split.TRAIN]:
        families[icon.key, icon.concept].add(icon.family)
    trained = _class_names({place: len(found) for place, found in families.items()}, LEAST_FAMILIES_OF_CLASS)
    held_out = Counter((icon.key, icon.concept) for icon, _ in splits[Split.TEST_CONCEPT])
    emoji = [sample for name, samples in splits.items() if name.startswith("emoji/") for sample in samples]
    everywhere = sorted(emoji_in_all_sets([icon for icon, _ in emoji]))
    return {
        "zeroshot": _classes(trained, ICON_TEMPLATES, splits[Split.TEST_SET]),
        "zeroshot_concept": _classes(
            _class_names(held_out, PICTURES_PER_HELD_OUT_CLASS), ICON_TEMPLATES, splits[Split.TEST_CONCEPT]
        ),
        "zeroshot_emoji": _classes(everywhere, EMOJI_TEMPLATES, emoji),
    }


def _class_names(counts: dict[tuple[str, str], int], least: int) -> list[str]:
    """Name the concepts that occur often enough; of several spellings of one concept the commonest.

    Args:
        counts: how often a concept occurs, by its key and spelling.
        least: how often it has to.
    """
    best: dict[str, tuple[int, int, str]] = {}
    for (key, concept), count in counts.items():
        if count >= least:
            rank = (-count, len(concept), concept)
            best[key] = min(best.get(key, rank), rank)
    return sorted(concept for _, _, concept in best.values())


def _classes(names: list[str], templates: Sequence[str], samples: Sequence[Sample]) -> Classes:
    known = set(names)
    return Classes(names, templates, [sample for sample in samples if sample[0].concept in known])


def _check_not_empty(splits: dict[str, list[Sample]], classifications: dict[str, Classes], options: Options) -> None:
    empty = [name for name, samples in splits.items() if not samples]
    empty += [name for name, classes in classifications.items() if len(classes.names) < 2 or not classes.samples]
    if empty:
        cause = "the package" if options.limit is None else f"--limit {options.limit}"
        remedy = "use the package that this builder names" if options.limit is None else "use a larger --limit"
        raise BuildError(f"{cause} leaves nothing for {', '.join(empty)}; {remedy}")


def _write(
    folder: Path, splits: dict[str, list[Sample]], classifications: dict[str, Classes], spool: Spool, per_shard: int
) -> None:
    for name, samples in splits.items():
        write_pairs(folder / name, _members(samples, spool), len(samples), per_shard)
    for name, classes in classifications.items():
        pictures = ((spool.read(stored), icon.concept) for icon, stored in classes.samples)
        write_classification(folder / name, classes.names, classes.templates, pictures, len(classes.samples), per_shard)


def _members(samples: Sequence[Sample], spool: Spool) -> Iterable[Members]:
    for key, (icon, stored) in enumerate(samples):
        facts = {
            "key": key,
            "concept": icon.concept,
            "style": icon.style,
            "set": icon.prefix,
            "name": icon.name,
            "category": icon.category,
            "license": icon.license,
            "aliases": list(icon.aliases),
        }
        yield {
            "png": spool.read(stored),
            "txt": icon.caption.encode(),
            "json": json.dumps(facts, ensure_ascii=False).encode(),
        }
