"""The emoji of a set under one name each, the same in all sets; and the countries' names that their flags give."""

import re
from collections.abc import Iterator

_SKIN_TONE = re.compile("1f3f[b-f]")
_FLAG = re.compile(r"^flag-(?:for-)?(?:flag-)?(?!in-hole)")
_FIRST_REGIONAL_LETTER = 0x1F1E6


def country_names(chars: dict[str, str]) -> dict[str, str]:
    """Name the countries by their flags.

    Args:
        chars: an emoji set's icon names by code points ("1f1eb-1f1f7" is "flag-for-flag-france").
    Returns:
        Names by two-letter code ("fr" is "france").
    """
    names = {}
    for points, name in chars.items():
        letters = [int(point, 16) - _FIRST_REGIONAL_LETTER for point in points.split("-")]
        if len(letters) == 2 and all(0 <= letter < 26 for letter in letters) and name.startswith("flag-"):
            code = "".join(chr(ord("a") + letter) for letter in letters)
            names[code] = _FLAG.sub("", name).replace("-", " ")
    return names


def emoji_names(prefix: str, data: dict, common_names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Name the emoji of a set, without variants of skin colour and a set's own inventions.

    Args:
        prefix: the set.
        data: its data.
        common_names: icon names by code points, in the set whose spelling counts.
    Yields:
        Pairs of an icon's name and its concept, one icon per concept.
    """
    points_of = {name: points for points, name in data.get("chars", {}).items()}
    extras = _extras(data) if prefix == "openmoji" else set()
    seen: set[str] = set()
    for name, icon in sorted(data["icons"].items()):
        points = points_of.get(name, "").split("-")
        has_skin_tone = "skin-tone" in name or (len(points) > 1 and any(map(_SKIN_TONE.fullmatch, points)))
        if icon.get("hidden") or has_skin_tone or name in extras:
            continue
        concept = _FLAG.sub("flag of ", common_names.get("-".join(points), name)).replace("-", " ")
        if concept not in seen:
            seen.add(concept)
            yield name, concept


def _extras(data: dict) -> set[str]:
    return {
        name
        for category, names in data.get("categories", {}).items()
        if category.startswith("Extras")
        for name in names
    }
