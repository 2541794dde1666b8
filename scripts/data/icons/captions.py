"""Captions as people write them."""


def icon_caption(concept: str, style: str) -> str:
    """Write the caption of an icon: "credit card, outline icon", or "credit card icon" where the style is plain."""
    return f"{concept}, {style} icon" if style else f"{concept} icon"


def emoji_caption(concept: str) -> str:
    """Write the caption of an emoji: "grinning cat emoji"."""
    return f"{concept} emoji"
