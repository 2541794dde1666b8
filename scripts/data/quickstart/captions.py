"""Captions as people write them."""

import random

from building.names import concept_key

from .names import is_held_out
from .sources import Drawing

TAGS_PER_CAPTION = 2


def caption(drawing: Drawing) -> str:
    """Write the caption of a drawing.

    Examples: "credit card, outline icon"; "grinning cat emoji"; "text underline, thin icon of font, typeface".

    No caption of the training split names a held-out concept among its tags.
    """
    if drawing.source == "openmoji":
        return f"{drawing.name} emoji" + (f", {drawing.skin_tone} skin tone" if drawing.skin_tone else "")
    icon = f"{drawing.name} icon" if drawing.style == "regular" else f"{drawing.name}, {drawing.style} icon"
    tags = _choose_tags(drawing)
    return f"{icon} of {', '.join(tags)}" if tags else icon


def _choose_tags(drawing: Drawing) -> list[str]:
    """Draw a few tags, other ones for every style of a drawing, so that its captions differ."""
    own_key = concept_key(drawing.name)
    allowed = [tag for tag in drawing.tags if concept_key(tag) != own_key]
    if not is_held_out(own_key):
        allowed = [tag for tag in allowed if not is_held_out(concept_key(tag))]
    chance = random.Random(f"{drawing.name}/{drawing.style}")
    return chance.sample(allowed, min(TAGS_PER_CAPTION, len(allowed)))
