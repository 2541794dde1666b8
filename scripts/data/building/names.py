"""What makes two names the same concept."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

# Words that tell two drawings of one thing apart, or are grammar: "play button" (emoji) is "play" (icon).
_EMPTY_WORDS = frozenset({"alt", "variant", "button", "of", "the", "with", "and"})


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def concept_key(name: str) -> str:
    """Normalise a name, so that every spelling of a concept gives the same key.

    Case, accents, punctuation, plural, word order and words without content do not count: "Arrow-Left (alt)" and
    "left arrows" are one concept. A name made of such words only keeps them.

    Args:
        name: a name in any of the packages' spellings.
    Returns:
        Lower-case ASCII words in alphabetical order, separated by one space; the name itself, lower-case and
        stripped, if it has no ASCII letter or digit.
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("'", "")
    words = re.findall(r"[a-z0-9]+", ascii_name)
    content = [word for word in words if word not in _EMPTY_WORDS] or words
    return " ".join(sorted(_singular(word) for word in content)) or name.strip().lower()


def shared_names(names: Iterable[str]) -> dict[str, str]:
    """Choose the name of every concept key: the commonest of its spellings, then the shortest, then the first."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for name in names:
        spellings[concept_key(name)][name] += 1
    return {key: min(counter, key=lambda name: (-counter[name], len(name), name)) for key, counter in spellings.items()}


def stable_hash(text: str) -> int:
    """Hash a text to 128 bits, the same on every machine and in every run (unlike `hash`)."""
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)
