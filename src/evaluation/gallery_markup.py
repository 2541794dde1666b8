"""Pieces of HTML that all parts of the gallery page are made of; what others wrote becomes text here."""

from __future__ import annotations

from html import escape

# A longer caption is cut: it is there to be recognised.
LONGEST_TEXT = 160

# Colour alone would not tell everybody.
RIGHT_MARK = '<span class="mark">✓<span class="hidden"> right</span></span>'


def pair_key(i: int) -> str:
    """The sprite's key of the image of pair i."""
    return f"p{i}"


def file_key(number: int) -> str:
    """The sprite's key of an image from outside."""
    return f"f{number}"


def plain_text(text: str, longest: int = LONGEST_TEXT) -> str:
    """Text from outside on one line, without control characters, cut if it is long; not escaped."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return plain if len(plain) <= longest else plain[: longest - 1].rstrip() + "…"


def text_of(text: str, longest: int = LONGEST_TEXT) -> str:
    """Text from outside as HTML: `plain_text`, escaped."""
    return escape(plain_text(text, longest))


def alt_of(caption: str) -> str:
    """What an image is called where it cannot be seen: its caption; not escaped."""
    return plain_text(caption) or "image without a caption"


def quoted(text: str) -> str:
    """`text_of`, apart from the text around it."""
    # bdi: a caption in a script that runs from right to left must not turn the text around it.
    return f"<bdi>{text_of(text)}</bdi>"


def decimal(value: float, digits: int = 2) -> str:
    """A number with a real minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def bar(similarity: float) -> str:
    """A thin bar as long as a cosine similarity; none below 0."""
    width = 100 * min(max(similarity, 0.0), 1.0)
    return (
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="4"/><rect class="fill" width="{width:.1f}" height="4"/></svg>'
    )


def badge(text: str, kind: str = "") -> str:
    """A small label; `text` is HTML, `kind` is empty or "warn"."""
    return f'<span class="badge {kind}">{text}</span>'


def plural(number: int, one: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {one}" if number == 1 else f"{number:,} {one}s"


def caption_line(caption: str, similarity: float, *, kind: str = "", label: str = "", several: int = 1) -> str:
    """A caption with its cosine similarity, as an item of a list.

    Args:
        caption: as the set has it.
        similarity: cosine similarity.
        kind: "right", "wrong" or empty.
        label: what the caption is, on a line above it.
        several: how many pairs have it.
    """
    above = f'<span class="eyebrow">{label}</span>' if label else ""
    beside = f' <span class="note">in {several:,} pairs</span>' if several > 1 else ""
    mark = RIGHT_MARK if kind == "right" and not label else ""
    return (
        f'<li class="line {kind}"><span class="said">{above}{quoted(caption)}{beside}{mark}</span>'
        f'<span class="score">{decimal(similarity)}</span>{bar(similarity)}</li>'
    )


def section(name: str, title: str, how_to_read: str, body: str) -> str:
    """A section of the page; all arguments are HTML."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><div class="wrap"><h2 id="{name}-title">{title}</h2>\n'
        f'<p class="how">{how_to_read}</p>\n{body}</div></section>\n'
    )
