"""Which held-out set numbers were measured on, whatever its folder is called: digests of what decides them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from evaluation.datasets import ClassificationSource, Member, PairDataset, ShardClassification


def pairs_digest(pairs: PairDataset) -> str:
    """SHA-256, in hexadecimal, of every sample's key, sizes of its files and caption, in global order.

    Raises:
        UserError: for a caption that cannot be read.
    """
    return _digest((pairs.index.keys[i], _sizes(pairs.index.members[i]), pairs.caption(i)) for i in range(pairs.total))


def classification_digest(source: ClassificationSource) -> str:
    """SHA-256, in hexadecimal, of class names, templates, and every image's name, size and, in class folders, label."""
    dataset = source.dataset
    prompts = [("class", name) for name in source.class_names]
    prompts += [("template", template) for template in _texts(source)]
    images: Iterable[tuple[object, ...]]
    if isinstance(dataset, ShardClassification):
        images = ((key, _sizes(members)) for key, members in zip(dataset.index.keys, dataset.index.members))
    else:
        images = ((path.name, path.stat().st_size, label) for path, label in dataset.files)
    return _digest([*prompts, *images])


def _texts(source: ClassificationSource) -> list[str]:
    # open_clip's own templates are functions: what they make of one name tells them apart.
    return [template("x") if callable(template) else template for template in source.templates]


def _sizes(members: dict[str, Member]) -> list[tuple[str, int]]:
    return sorted((extension, member.size) for extension, member in members.items())


def _digest(rows: Iterable[tuple[object, ...]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode() + b"\n")
    return digest.hexdigest()
