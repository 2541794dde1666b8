"""The list of all icons that are used, with what is known about each but its drawing."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from building.names import concept_key

from .captions import emoji_caption, icon_caption
from .emoji import country_names, emoji_names
from .names import Meaning, Naming
from .package import Package
from .selection import EMOJI_SETS, IconSet, choose_sets
from .splits import Split, split_of

NAMING_EMOJI_SET = "twemoji"  # its names count for every code point
GROUPING_EMOJI_SETS = ("twemoji", "noto", "fluent-emoji-flat")  # their categories are the groups of Unicode

_MOST_ALIASES = 6
_BRAND = re.compile("brand|logo", re.IGNORECASE)
_A_WORD = re.compile("[a-z]{2}")
_FLAG_SHAPE = re.compile("-(4x3|1x1)$")


@dataclass(frozen=True, slots=True)
class Icon:
    """One drawing: its set, the name there, and what that name says. `key` is the concept's, for all its spellings."""

    prefix: str
    name: str
    concept: str
    key: str
    style: str
    caption: str
    category: str
    license: str
    family: str
    aliases: tuple[str, ...]
    split: Split


@dataclass(frozen=True)
class Catalogue:
    """Icons sorted by set and name, the sets by prefix, and how many icons were left out for which reason."""

    icons: list[Icon]
    sets: dict[str, IconSet]
    dropped: Counter[str]


def read_catalogue(package: Package) -> Catalogue:
    """List the icons of a package that are used.

    Raises:
        BuildError: the package is damaged.
    """
    sets, dropped = choose_sets(package.collections)
    names_by_points: dict[str, str] = {}
    for _, data in package.icon_sets({NAMING_EMOJI_SET}):
        names_by_points = data.get("chars", {})
    countries = country_names(names_by_points)
    icons: list[Icon] = []
    for prefix, data in package.icon_sets(set(sets)):
        if sets[prefix].is_emoji:
            icons += _list_emoji(sets[prefix], data, names_by_points)
        else:
            icons += _list_icons(sets[prefix], data, countries, dropped)
    icons = _in_unicode_groups(icons, dropped)
    return Catalogue(sorted(icons, key=lambda icon: (icon.prefix, icon.name)), sets, dropped)


def _list_icons(icon_set: IconSet, data: dict, countries: dict[str, str], dropped: Counter[str]) -> Iterator[Icon]:
    naming, categories, aliases = Naming.of(data), _categories(data), _aliases(data)
    meanings: dict[str, Meaning] = {}
    for name, icon in sorted(data["icons"].items()):
        meaning = _flag_meaning(icon_set, name, countries) if icon_set.has_flags else naming.meaning(name)
        reason = _reason_against(icon, name, categories.get(name, ""), meaning)
        if meaning is None or reason is not None:
            dropped[reason or "unnamed_flag"] += 1
        else:
            meanings[name] = meaning
    largest = _largest_sizes(meanings)
    dropped["other_sizes"] += len(meanings) - len(largest)
    for name in largest:
        concept, key = meanings[name].concept, concept_key(meanings[name].concept)
        style = meanings[name].style
        if icon_set.has_palette and "color" not in style and not icon_set.has_flags:
            style = f"color {style}".strip()
        yield Icon(
            prefix=icon_set.prefix,
            name=name,
            concept=concept,
            key=key,
            style=style,
            caption=icon_caption(concept, style),
            category=categories.get(name, ""),
            license=icon_set.license,
            family=icon_set.family,
            aliases=tuple(aliases[name][:_MOST_ALIASES]),
            split=split_of(key, icon_set.prefix, icon_set.family),
        )


def _reason_against(icon: dict, name: str, category: str, meaning: Meaning | None) -> str | None:
    if icon.get("hidden"):
        return "hidden"  # deprecated by its authors
    if meaning is None:
        return "unnamed_flag"
    if _BRAND.search(category + name):
        return "brand_icons"
    return None if _A_WORD.search(meaning.concept) else "no_word_in_name"


def _flag_meaning(icon_set: IconSet, name: str, countries: dict[str, str]) -> Meaning | None:
    country = countries.get(_FLAG_SHAPE.sub("", name))
    style = "circle" if icon_set.prefix == "circle-flags" else "square" if name.endswith("1x1") else ""
    return Meaning(f"flag of {country}", style, 0) if country else None


def _largest_sizes(meanings: dict[str, Meaning]) -> list[str]:
    """Keep one size of what comes in several: they differ in details only. Names without a size all stay."""
    best: dict[tuple[str, ...], str] = {}
    for name, meaning in meanings.items():
        place = (meaning.concept, meaning.style) if meaning.size else (meaning.concept, meaning.style, name)
        if place not in best or meaning.size > meanings[best[place]].size:
            best[place] = name
    return list(best.values())


def _categories(data: dict) -> dict[str, str]:
    """Give the first category of every icon that has one."""
    return {name: title for title, names in reversed(data.get("categories", {}).items()) for name in names}


def _aliases(data: dict) -> defaultdict[str, list[str]]:
    """Collect other names by icon; an alias that turns or flips its icon is another drawing."""
    aliases: defaultdict[str, list[str]] = defaultdict(list)
    for name, alias in data.get("aliases", {}).items():
        if set(alias) <= {"parent", "hidden"}:
            aliases[alias["parent"]].append(name)
    return aliases


def _list_emoji(icon_set: IconSet, data: dict, names_by_points: dict[str, str]) -> Iterator[Icon]:
    categories = _categories(data)
    for name, concept in emoji_names(icon_set.prefix, data, names_by_points):
        yield Icon(
            prefix=icon_set.prefix,
            name=name,
            concept=concept,
            key=concept_key(concept),
            style="emoji",
            caption=emoji_caption(concept),
            category=categories.get(name, ""),
            license=icon_set.license,
            family=icon_set.family,
            aliases=(),
            split=Split.EMOJI,
        )


def _in_unicode_groups(icons: list[Icon], dropped: Counter[str]) -> list[Icon]:
    """Leave out emoji that Unicode has in no group: they have no name shared by the sets."""
    listed = {icon.concept for icon in icons if icon.prefix in GROUPING_EMOJI_SETS and icon.category}
    kept = [icon for icon in icons if icon.split is not Split.EMOJI or icon.concept in listed]
    dropped["emoji_without_group"] += len(icons) - len(kept)
    return kept


def emoji_in_all_sets(icons: list[Icon]) -> set[str]:
    """Name the emoji that every emoji set draws."""
    counts = Counter(icon.concept for icon in icons if icon.split is Split.EMOJI)
    return {concept for concept, count in counts.items() if count == len(EMOJI_SETS)}
