"""Which icon sets are used, and which of them are drawn by one hand."""

from collections import Counter
from dataclasses import dataclass

# SPDX identifiers of licences that ask for no more than attribution.
PERMISSIVE = frozenset(
    {
        "MIT",
        "Apache-2.0",
        "ISC",
        "CC0-1.0",
        "Unlicense",
        "BSD-3-Clause",
        "MPL-2.0",
        "OFL-1.1",
        "CC-BY-4.0",
        "CC-BY-3.0",
    }
)

# Multi-colour emoji: never trained, a far transfer of their own. OpenMoji is CC BY-SA.
EMOJI_SETS = ("twemoji", "noto", "openmoji", "fluent-emoji-flat", "emojione", "noto-v1")

# Whole drawing styles that are held out.
TEST_SETS = frozenset(
    {
        "iconoir",
        "pixelarticons",
        "streamline-freehand",
        "streamline-freehand-color",
        "flat-color-icons",
        "teenyicons",
    }
)

_LEFT_OUT = {
    "animated": "svg-spinners line-md meteocons",  # their first frame is often blank
    "emoji_like": "fluent-emoji fluent-emoji-high-contrast emojione-monotone emojione-v1 fxemoji streamline-emojis",
    "older_version": "fa fa-solid fa-regular fa-brands fa6-solid fa6-regular fa6-brands "
    "heroicons-outline heroicons-solid pepicons bx bxs bxl feather",
    "loose_names": "iconmind",  # names like "agent queue" and "run idle" say little about the drawing
    "logos": "nonicons",  # and the categories below
}
_REASON = {prefix: reason for reason, prefixes in _LEFT_OUT.items() for prefix in prefixes.split()}
_LOGO_CATEGORIES = frozenset({"Logos", "Programming"})  # trademarks and file types: nobody learns these names

# Sets drawn by the same hand or derived from one another.
_FAMILIES = {
    "material": "ic material-symbols material-symbols-light",
    "mdi": "mdi mdi-light",
    "fa": "fa7-solid fa7-regular la",
    "ion": "ion famicons",
    "uni": "uil uim uis uit",
    "iconpark": "icon-park icon-park-outline icon-park-solid icon-park-twotone",
    "solar": "solar reicon",
    "lucide": "lucide lucide-lab keyline-icons",
    "streamline": "streamline streamline-color streamline-flex streamline-flex-color streamline-plump "
    "streamline-plump-color streamline-sharp streamline-sharp-color",
    "ultimate": "streamline-ultimate streamline-ultimate-color",
    "freehand": "streamline-freehand streamline-freehand-color",
    "cyber": "streamline-cyber streamline-cyber-color",
    "pepicons": "pepicons-pop pepicons-print pepicons-pencil",
    "glyphs": "glyphs glyphs-poly",
    "fluent": "fluent fluent-color",
    "flags": "flag circle-flags flagpack cif",
    "maki": "maki temaki",
}
_FAMILY = {prefix: family for family, prefixes in _FAMILIES.items() for prefix in prefixes.split()}


@dataclass(frozen=True)
class IconSet:
    """Facts about one set; `license` is an SPDX identifier, or the licence's title where it has none."""

    prefix: str
    title: str
    author: str
    author_url: str
    license: str
    license_url: str
    has_palette: bool

    @property
    def family(self) -> str:
        """Name of the sets drawn by the same hand."""
        return _FAMILY.get(self.prefix, self.prefix)

    @property
    def is_emoji(self) -> bool:
        """Whether it is one of the emoji sets."""
        return self.prefix in EMOJI_SETS

    @property
    def has_flags(self) -> bool:
        """Whether its icons are flags, named by country codes."""
        return self.family == "flags"


def choose_sets(collections: dict[str, dict]) -> tuple[dict[str, IconSet], Counter[str]]:
    """Choose the sets to use.

    Args:
        collections: content of collections.json.
    Returns:
        The sets by prefix, and how many icons of other sets were left out for which reason.
    """
    chosen: dict[str, IconSet] = {}
    dropped: Counter[str] = Counter()
    for prefix, facts in sorted(collections.items()):
        icon_set = _describe(prefix, facts)
        reason = None if icon_set.is_emoji else _reason_against(icon_set, facts.get("category", ""))
        if reason is None:
            chosen[prefix] = icon_set
        else:
            dropped[f"set_{reason}"] += facts.get("total", 0)
    return chosen, dropped


def _describe(prefix: str, facts: dict) -> IconSet:
    author, terms = facts.get("author", {}), facts.get("license", {})
    return IconSet(
        prefix=prefix,
        title=facts.get("name", prefix),
        author=author.get("name", ""),
        author_url=author.get("url", ""),
        license=terms.get("spdx") or terms.get("title", "unknown"),
        license_url=terms.get("url", ""),
        has_palette=bool(facts.get("palette")),
    )


def _reason_against(icon_set: IconSet, category: str) -> str | None:
    if icon_set.license not in PERMISSIVE:
        return "license"
    if category in _LOGO_CATEGORIES:
        return "logos"
    return _REASON.get(icon_set.prefix)
