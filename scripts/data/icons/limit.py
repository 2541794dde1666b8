"""A small part of the icons that still has something in every split."""

from collections import defaultdict
from collections.abc import Sequence

from building.names import stable_hash

from .catalogue import Icon
from .selection import EMOJI_SETS
from .splits import Split

LEAST_FAMILIES_OF_CLASS = 12
_LEAST_CONCEPTS = 3
_SEVERAL_PICTURES = 5


def whole_concepts(icons: Sequence[Icon], limit: int) -> list[Icon]:
    """Take about `limit` icons as whole concepts over all sets.

    The concepts are drawn in a stable random order from each of a few kinds, in proportion to the kind's icons, and at least
    3 of each kind. So a small part is a fair sample, and no split is empty unless it is in the whole.

    Args:
        icons: all icons.
        limit: how many to take; less than about 300 cannot be had.
    Returns:
        The icons taken, in their order.
    """
    concepts: dict[tuple[bool, str], list[Icon]] = defaultdict(list)
    for icon in icons:
        concepts[icon.split is Split.EMOJI, icon.key].append(icon)
    kinds: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    for place, members in concepts.items():
        kinds[_kind(members)].append(place)
    chosen: set[tuple[bool, str]] = set()
    for places in kinds.values():
        share = limit * sum(len(concepts[place]) for place in places) / len(icons)
        taken = 0
        for rank, place in enumerate(sorted(places, key=lambda place: stable_hash(f"limit {place[1]}"))):
            if taken >= share and rank >= _LEAST_CONCEPTS:
                break
            chosen.add(place)
            taken += len(concepts[place])
    return [icon for icon in icons if (icon.split is Split.EMOJI, icon.key) in chosen]


def _kind(members: Sequence[Icon]) -> str:
    splits = {icon.split for icon in members}
    if Split.EMOJI in splits:
        return "emoji of all sets" if len(members) == len(EMOJI_SETS) else "emoji"
    if Split.TEST_CONCEPT in splits:
        return "held out, a class" if len(members) >= _SEVERAL_PICTURES else "held out"
    families = {icon.family for icon in members if icon.split is Split.TRAIN}
    if Split.TEST_SET in splits:
        return "a class" if len(families) >= LEAST_FAMILIES_OF_CLASS else "in a held-out set"
    if Split.TEST_COMBO in splits and families:
        return "held out in a family"
    return "other"
