"""Text queries for a demonstration on the held-out split."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

QUERIES = 8
_LEAST_IMAGES = 2
# How many training captions hold each word of a good query. In fewer, a model has learned nothing of it (the name as a
# whole is new to it, the words must not be); in more, the word fits half of all pictures.
_LEAST_TRAINED, _MOST_TRAINED = 5, 300


class Captioned(Protocol):
    """The part of a sample that matters here."""

    caption: str
    concept: str
    source: str


def choose_queries(train: Sequence[Captioned], test: Sequence[Captioned]) -> list[dict]:
    """Choose captions of the test split to search it with: different everyday things, emoji and icons in turn.

    Everyday things are those in whose names every word is also a word for some emoji; the best known are those that
    most packages draw. No two queries share a word of their names. Others are taken only where these are too few.

    Args:
        train: samples of the training split.
        test: samples of the held-out split, in the order of their keys.
    Returns:
        At most 8 entries {"text": a caption, "concept": its name, "keys": keys of all its held-out pictures}.
    """
    keys: dict[str, list[int]] = {}
    for key, sample in enumerate(test):
        keys.setdefault(sample.concept, []).append(key)
    drawn_by = {concept: {test[key].source for key in held_out} for concept, held_out in keys.items()}
    good = {concept for concept in _learnable(keys, train) if len(keys[concept]) >= _LEAST_IMAGES}
    waiting = sorted(keys, key=lambda c: (c not in good, -len(drawn_by[c]), -len(keys[c]), c))
    chosen: list[dict] = []
    while waiting and len(chosen) < QUERIES:
        wants_emoji = len(chosen) % 2 == 0
        fitting = (concept for concept in waiting if ("openmoji" in drawn_by[concept]) == wants_emoji)
        concept = next(fitting, waiting[0])
        chosen.append({"text": _text([test[key] for key in keys[concept]]), "concept": concept, "keys": keys[concept]})
        waiting = [other for other in waiting if not _words(other) & _words(concept)]
    return chosen


def _learnable(concepts: Iterable[str], train: Sequence[Captioned]) -> list[str]:
    trained = Counter(word for sample in train for word in _words(sample.caption))
    of_emoji = {word for sample in train if sample.source == "openmoji" for word in _words(sample.caption)}
    known = {word for word in of_emoji if _LEAST_TRAINED <= trained[word] <= _MOST_TRAINED}
    return [concept for concept in concepts if _words(concept) and _words(concept) <= known]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))


def _text(samples: Sequence[Captioned]) -> str:
    """Take the emoji's caption where there is one, else the shortest."""
    emoji = [sample.caption for sample in samples if sample.source == "openmoji"]
    return min(emoji or [sample.caption for sample in samples], key=lambda text: (len(text), text))
