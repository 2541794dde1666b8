"""The manifest: what is in the folder, what it was made of, under which licences, and what guessing would score."""

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from . import BUILDER_VERSION
from .duplicates import MOST_CHECKED, NEAR_RMSE, Sample, near_duplicate_share
from .package import NAME
from .selection import IconSet
from .splits import Split

BATCH = 1024
RECALLS = (1, 5, 10)
_RENDERERS = ("resvg-py", "pillow")


def describe(
    options: dict,
    version: str,
    sets: dict[str, IconSet],
    dropped: Counter[str],
    splits: dict[str, list[Sample]],
    classifications: dict[str, tuple[int, int]],
) -> dict:
    """Put the manifest together.

    Args:
        options: what was asked for.
        version: the npm package's version.
        sets: the icon sets by prefix.
        dropped: how many icons were left out for which reason.
        splits: samples by folder.
        classifications: number of classes and of pictures by folder.
    Returns:
        Values for JSON: builder, builder_version, options, package, packages, splits, classification, chance,
        near_duplicates, dropped, licenses and sets.
    """
    trained = {icon.key for icon, _ in splits[Split.TRAIN]}
    return {
        "builder": "study",
        "builder_version": BUILDER_VERSION,
        "options": options,
        "package": {"name": NAME, "version": version, "integrity": options["package"]},
        "packages": {name: importlib.metadata.version(name) for name in sorted(_RENDERERS)},
        "splits": {name: _count(samples, trained) for name, samples in splits.items()},
        "classification": {
            name: {"classes": classes, "images": images} for name, (classes, images) in classifications.items()
        },
        "chance": _chance(splits, classifications),
        "near_duplicates": _near_duplicates(splits),
        "dropped": dict(sorted(dropped.items())),
        "licenses": _licenses(splits),
        "sets": _sets(sets, splits),
    }


def _count(samples: Sequence[Sample], trained: AbstractSet[str]) -> dict:
    """Count a split.

    Returns:
        samples; concepts (spellings of one concept count once), and how many of them are in the training split; sets;
        distinct captions; samples whose caption another sample has, too; the commonest caption; how many other samples of a
        random batch of 1,024 have a sample's caption, and its concept, on average.
    """
    captions = Counter(icon.caption for icon, _ in samples)
    concepts = Counter(icon.key for icon, _ in samples)
    text, repeats = min(captions.items(), key=lambda item: (-item[1], item[0]))
    return {
        "samples": len(samples),
        "concepts": len(concepts),
        "concepts_in_train": len(concepts.keys() & trained),
        "concept_names": len({icon.concept for icon, _ in samples}),
        "sets": len({icon.prefix for icon, _ in samples}),
        "distinct_captions": len(captions),
        "samples_with_repeated_caption": sum(count for count in captions.values() if count > 1),
        "commonest_caption": {"text": text, "samples": repeats},
        f"expected_same_caption_in_batch_{BATCH}": _expected_repeats(captions.values()),
        f"expected_same_concept_in_batch_{BATCH}": _expected_repeats(concepts.values()),
    }


def _expected_repeats(counts: Iterable[int]) -> float:
    """Average number of other samples with the same value, for a sample in a batch drawn without replacement."""
    counts = list(counts)
    total = sum(counts)
    pairs = sum(count * (count - 1) for count in counts)
    return min(BATCH - 1, total - 1) * pairs / (total * (total - 1)) if total > 1 else 0.0


def _chance(splits: dict[str, list[Sample]], classifications: dict[str, tuple[int, int]]) -> dict:
    one_to_one = {name: len(samples) for name, samples in splits.items() if name.startswith(("retrieval_", "emoji/"))}
    return {
        "top1": {name: 1 / classes for name, (classes, _) in classifications.items()},
        **{f"recall@{k}": {name: min(1.0, k / count) for name, count in one_to_one.items()} for k in RECALLS},
    }


def _near_duplicates(splits: dict[str, list[Sample]]) -> dict:
    train = [stored for _, stored in splits[Split.TRAIN]]
    tests = (Split.TEST_CONCEPT, Split.TEST_COMBO, Split.TEST_SET)
    return {
        "what": f"share of test pictures (of {MOST_CHECKED} at most) with a training picture whose 32 x 32 grey thumbnail has "
        f"a root mean square difference below {NEAR_RMSE}",
        **{str(test): near_duplicate_share(train, [stored for _, stored in splits[test]]) for test in tests},
    }


def _whole_splits(splits: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    return {name: samples for name, samples in splits.items() if not name.startswith("retrieval_")}


def _licenses(splits: dict[str, list[Sample]]) -> dict[str, dict[str, int]]:
    """Count samples by licence; the retrieval splits are parts of others."""
    return {
        name: dict(sorted(Counter(icon.license for icon, _ in samples).items()))
        for name, samples in _whole_splits(splits).items()
    }


def _sets(sets: dict[str, IconSet], splits: dict[str, list[Sample]]) -> dict[str, dict]:
    """List the sets in use with what their licences ask to be named."""
    counts: dict[str, Counter[str]] = {}
    for name, samples in _whole_splits(splits).items():
        for icon, _ in samples:
            counts.setdefault(icon.prefix, Counter())[name] += 1
    return {
        prefix: {
            "title": sets[prefix].title,
            "author": sets[prefix].author,
            "url": sets[prefix].author_url,
            "license": sets[prefix].license,
            "license_url": sets[prefix].license_url,
            "samples": dict(sorted(counts[prefix].items())),
        }
        for prefix in sorted(counts)
    }
