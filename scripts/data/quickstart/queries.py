"""Text queries for a demonstration on the held-out split."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

QUERIES = 8
_LEAST_IMAGES = 3


class Captioned(Protocol):
    """The part of a sample that matters here."""

    caption: str
    concept: str
    source: str


def choose_queries(train: Sequence[Captioned], test: Sequence[Captioned]) -> list[dict]:
    """Choose captions of the test split to search it with: new names made of known words, emoji and icons in turn.

    A held-out name as a whole is new to a model; it can be found if its words were learnt from other names. So names of
    several words come first, those before others whose rarest word is in most names of the training split. No two queries
    share a word. Names of one word, or with few pictures, are taken only where these are too few.

    Args:
        train: samples of the training split.
        test: samples of the held-out split, in the order of their keys.
    Returns:
        At most 8 entries {"text": a caption, "concept": its name, "keys": keys of all its held-out pictures}.
    """
    keys: dict[str, list[int]] = {}
    for key, sample in enumerate(test):
        keys.setdefault(sample.concept, []).append(key)
    emoji = {sample.concept for sample in test if sample.source == "openmoji"}
    known = Counter(word for concept in {sample.concept for sample in train} for word in _words(concept))

    def preference(concept: str) -> tuple[bool, int, int, str]:
        words = _words(concept)
        is_composed = len(words) > 1 and len(keys[concept]) >= _LEAST_IMAGES
        return not is_composed, -min((known[word] for word in words), default=0), -len(keys[concept]), concept

    waiting = sorted(keys, key=preference)
    chosen: list[dict] = []
    while waiting and len(chosen) < QUERIES:
        wants_emoji = len(chosen) % 2 == 0
        composed = [concept for concept in waiting if not preference(concept)[0]] or waiting
        concept = next((concept for concept in composed if (concept in emoji) == wants_emoji), composed[0])
        chosen.append({"text": _text([test[key] for key in keys[concept]]), "concept": concept, "keys": keys[concept]})
        waiting = [other for other in waiting if not _words(other) & _words(concept)]
    return chosen


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))


def _text(samples: Sequence[Captioned]) -> str:
    """Take the emoji's caption where there is one, else the shortest."""
    emoji = [sample.caption for sample in samples if sample.source == "openmoji"]
    return min(emoji or [sample.caption for sample in samples], key=lambda text: (len(text), text))
