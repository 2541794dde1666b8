"""What an icon's name means: "bell-off-24-outline" is the concept "bell off" in outline style at 24 pixels."""

import functools
import re
from collections.abc import Set
from dataclasses import dataclass

# Words for styles, in the sets' own spelling, and the one word that captions have for them.
_SAME_STYLE = {
    "regular": "",
    "default": "",
    "basic": "",
    "path": "",
    "colors": "",
    "branded": "",
    "stroke": "outline",
    "outlined": "outline",
    "fill": "filled",
    "solid": "filled",
    "baseline": "filled",
    "linear": "line",
    "round": "rounded",
    "duo": "duotone",
    "twotone": "two-tone",
    "two tone": "two-tone",
    "boldduotone": "bold duotone",
}

# Endings that are always a style, and those that are one only where the name without them is in the set, too.
_STYLE_ENDINGS = frozenset({"outline", "outlined", "filled", "duotone", "twotone"})
_STYLE_IF_PLAIN_EXISTS = frozenset(
    {"fill", "solid", "rounded", "round", "sharp", "line", "bold", "thin", "light", "negative", "linear"}
)
_MOST_STYLE_ENDINGS = 3

_SIZE = re.compile(r"\b\d+(px)?(x\d+)?\b")
_ZERO_NUMBER = re.compile(r"(.*[a-z])-0\d")  # joystick-02
_NUMBER = re.compile(r"(.*[a-z])-?[1-9]")  # glass2, bill-2
_NUMBER_WORD = re.compile(r"(.*)-(?:one|two|three|four)")


@dataclass(frozen=True)
class Meaning:
    """What a name says; `size` is in pixels, 0 where the name has none."""

    concept: str
    style: str
    size: int


@dataclass(frozen=True)
class Naming:
    """How a set forms its names: labels of endings and of beginnings ("" is the label of all other names)."""

    names: Set[str]
    suffixes: dict[str, str]
    prefixes: dict[str, str]

    @classmethod
    def of(cls, data: dict) -> "Naming":
        """Take the rules out of a set's data; longer endings go first, since one may end in another."""
        suffixes, prefixes = data.get("suffixes") or {}, data.get("prefixes") or {}
        return cls(frozenset(data["icons"]), _longest_first(suffixes), _longest_first(prefixes))

    def meaning(self, name: str) -> Meaning:
        """Split the name of an icon into concept, style and size."""
        base, label = self._without_affixes(name)
        styles = [label]
        if not self.suffixes or not label:
            base, endings = self._without_style_endings(base)
            styles = [*endings, label]
        digits = re.search(r"\d+", label)
        concept = self._without_number(base).replace("-", " ").replace("_", " ").strip()
        return Meaning(concept, style_words(" ".join(styles)), int(digits.group()) if digits else 0)

    def _without_affixes(self, name: str) -> tuple[str, str]:
        label = self.suffixes.get("", "")
        for suffix, suffix_label in self.suffixes.items():
            if suffix and name.endswith(f"-{suffix}"):
                name, label = name.removesuffix(f"-{suffix}"), suffix_label
                break
        for prefix, prefix_label in self.prefixes.items():
            if prefix and name.startswith(f"{prefix}-"):
                return name.removeprefix(f"{prefix}-"), prefix_label
        return name, label

    def _without_style_endings(self, base: str) -> tuple[str, list[str]]:
        endings: list[str] = []
        while len(endings) < _MOST_STYLE_ENDINGS:
            plain, _, ending = base.rpartition("-")
            is_style = ending in _STYLE_ENDINGS or (ending in _STYLE_IF_PLAIN_EXISTS and plain in self.names)
            if not plain or not is_style:
                break
            base = plain
            endings.insert(0, ending)
        return base, endings

    def _without_number(self, base: str) -> str:
        """Take the number off a further drawing of the same thing; "chart-4" stays where there is no "chart"."""
        zero, number = _ZERO_NUMBER.fullmatch(base), _NUMBER.fullmatch(base)
        if zero:
            base = zero.group(1)
        elif number and number.group(1) in self.names:
            base = number.group(1)
        word = _NUMBER_WORD.fullmatch(base)
        return word.group(1) if word and word.group(1) in self.names else base


def _longest_first(labels: dict[str, str]) -> dict[str, str]:
    return dict(sorted(labels.items(), key=lambda item: (-len(item[0]), item[0])))


@functools.cache
def style_words(text: str) -> str:
    """Say a style in the words of captions: without sizes, without "regular", and no word twice.

    Examples: "Outlined" is "outline"; "24px Solid" is "filled"; "Regular" is "".
    """
    words = _SIZE.sub(" ", text.lower().replace("-", " ")).strip()
    plain = _SAME_STYLE.get(words)
    if plain is None:
        plain = " ".join(_SAME_STYLE.get(word, word) for word in words.split())
    return " ".join(dict.fromkeys(plain.split())).replace("two tone", "two-tone")
