"""Searches: text queries, the images nearest to them, and which of these are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from evaluation.errors import UserError

NEIGHBOURS = 6


class Query(NamedTuple):
    """A text to search for, and the concept that right images show (empty: judged by the text alone)."""

    text: str
    concept: str = ""


class Hit(NamedTuple):
    """One image found: its index in the set, cosine similarity, and whether it is what the query asks for."""

    image: int
    similarity: float
    matches: bool


def is_match(query: Query, caption: str, concept: str) -> bool:
    """Whether an image is what a query asks for: its concept is the query's, or its caption or concept is the text."""
    text, wanted = query.text.strip().casefold(), query.concept.strip().casefold()
    if wanted and wanted == concept.strip().casefold():
        return True
    # Images without a concept or a caption have an empty one.
    return bool(text) and text in (caption.strip().casefold(), concept.strip().casefold())


def nearest_images(
    queries: Sequence[Query],
    query_features: Tensor,
    image_features: Tensor,
    describe: Callable[[int], tuple[str, str]],
    number: int = NEIGHBOURS,
) -> list[list[Hit]]:
    """The images nearest to each query.

    Args:
        queries: Q queries.
        query_features: [Q, d] float32, L2-normalised.
        image_features: [N, d] float32, L2-normalised.
        describe: index of an image → its caption and its concept.
        number: images per query; fewer if the set is smaller.

    Returns:
        Q lists of hits, nearest first.
    """
    found = (query_features @ image_features.T).topk(min(number, len(image_features)), dim=1)
    return [
        [Hit(index, similarity, is_match(query, *describe(index))) for index, similarity in zip(indices, similarities)]
        for query, indices, similarities in zip(queries, found.indices.tolist(), found.values.tolist())
    ]


def read_query_file(path: str | Path) -> list[Query]:
    """The queries in a JSON file: a list of strings, or of objects with a "text" (or "query") and perhaps a "concept".

    Raises:
        UserError: if the file is missing, no such list, or empty.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--queries {path} cannot be read ({error}); give a JSON list of queries.") from None
    queries = []
    for entry in entries if isinstance(entries, list) else [None]:
        facts: dict[str, Any] = entry if isinstance(entry, dict) else {"text": entry if isinstance(entry, str) else ""}
        text = facts.get("text") or facts.get("query")
        if not text or not str(text).strip():
            raise UserError(f'--queries {path} must be a JSON list of strings or of objects with "text" and "concept".')
        queries.append(Query(str(text), str(facts.get("concept") or "")))
    if not queries:
        raise UserError(f"--queries {path} is an empty list; give at least one query.")
    return queries
