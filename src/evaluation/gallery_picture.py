"""A page of searches: text queries and the images nearest to them, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from evaluation.search import NEIGHBOURS, Hit, Query
from evaluation.whole_files import replacing

THUMBNAIL = 128
PADDING = 9  # white between a thumbnail and its border
TILE = THUMBNAIL + 2 * PADDING
GAP = 16
MARGIN = 48
QUERY_WIDTH = 256
HEADER = 128
ROW = TILE + 52
FOOTER = 92
WIDTH = MARGIN + QUERY_WIDTH + NEIGHBOURS * (TILE + GAP) - GAP + MARGIN

INK, GREY, LIGHT, HAIRLINE = "#1c2026", "#6b7380", "#9aa1ac", "#e3e6ea"
BORDER, MATCH = "#d5d9df", "#2f9e63"
RADIUS = 14
# Shapes are drawn this much larger and scaled down, which is what makes their edges smooth.
OVERSAMPLING = 4


def gallery_size(number_of_queries: int) -> tuple[int, int]:
    """Width and height of the picture in pixels."""
    return WIDTH, HEADER + number_of_queries * ROW + FOOTER


def draw_gallery(
    path: Path,
    title: str,
    subtitle: str,
    queries: Sequence[Query],
    hits: Sequence[Sequence[Hit]],
    image: Callable[[int], Image.Image],
    searched: int,
) -> None:
    """Draw the page and write it as PNG, whole or not at all.

    Args:
        path: the file to write.
        title: the header line, large: the run.
        subtitle: the line under it: objective, epoch, model.
        queries: Q queries, one row each.
        hits: Q lists of at most NEIGHBOURS hits.
        image: index → the RGB image.
        searched: how many images were searched.
    """
    page = Image.new("RGB", gallery_size(len(queries)), "white")
    draw = ImageDraw.Draw(page)
    _text(draw, (MARGIN, 52), title, 26, INK, bold=True, width=WIDTH - 2 * MARGIN)
    _text(draw, (MARGIN, 82), subtitle, 14, GREY, width=WIDTH - 2 * MARGIN)
    for number, (query, found) in enumerate(zip(queries, hits)):
        top = HEADER + number * ROW
        draw.line((MARGIN, top - 15, WIDTH - MARGIN, top - 15), fill=HAIRLINE)
        _draw_query(draw, query.text, top)
        for place, hit in enumerate(found):
            left = MARGIN + QUERY_WIDTH + place * (TILE + GAP)
            _draw_hit(page, draw, image(hit.image), hit, left, top)
    _draw_footer(draw, page.height, searched)
    with replacing(path) as temporary:
        page.save(temporary, "PNG")


def _draw_query(draw: ImageDraw.ImageDraw, query: str, top: int) -> None:
    """The query in quotes, in at most four lines, centred on the thumbnails."""
    lines = _wrapped(f"“{query}”", _font(17, False), QUERY_WIDTH - 30)
    if len(lines) > 4:
        lines = [*lines[:3], lines[3].rstrip("”,. ") + " …”"]
    first = top + TILE // 2 - (len(lines) - 1) * 12
    for number, line in enumerate(lines):
        draw.text((MARGIN, first + number * 24), line, font=_font(17, False), fill=INK, anchor="lm")


def _draw_hit(page: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image, hit: Hit, left: int, top: int) -> None:
    """A rounded thumbnail with a thin border, green where it matches, and the similarity under it."""
    tile, mask = _tile(image, MATCH if hit.matches else BORDER, 3 if hit.matches else 1)
    page.paste(tile, (left, top), mask)
    color = MATCH if hit.matches else GREY
    text = f"{hit.similarity:.2f}".replace("-", "−")
    draw.text((left + TILE // 2, top + TILE + 14), text, font=_font(12, hit.matches), fill=color, anchor="mm")


def _tile(image: Image.Image, border: str, thickness: int) -> tuple[Image.Image, Image.Image]:
    """A square tile with the whole image on white inside a rounded border, and the tile's own rounded mask."""
    scale = min(THUMBNAIL / image.width, THUMBNAIL / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (TILE, TILE), "white")
    square.paste(
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS),
        ((TILE - size[0]) // 2, (TILE - size[1]) // 2),
    )
    tile = Image.new("RGB", square.size, border)
    tile.paste(square, (0, 0), _rounded(thickness))
    return tile, _rounded(0)


@cache
def _rounded(inset: int) -> Image.Image:
    """A mask of a rounded square, `inset` pixels inside the tile's edge, with smooth edges."""
    side = TILE * OVERSAMPLING
    mask = Image.new("L", (side, side), 0)
    edge = inset * OVERSAMPLING
    ImageDraw.Draw(mask).rounded_rectangle(
        (edge, edge, side - 1 - edge, side - 1 - edge), (RADIUS - inset) * OVERSAMPLING, fill=255
    )
    return mask.resize((TILE, TILE), Image.Resampling.BOX)


def _draw_footer(draw: ImageDraw.ImageDraw, height: int, searched: int) -> None:
    top = height - FOOTER + 14
    draw.line((MARGIN, top - 15, WIDTH - MARGIN, top - 15), fill=HAIRLINE)
    text = f"The {NEIGHBOURS} nearest of {searched:,} held-out images, by cosine similarity (the number under each)."
    _text(draw, (MARGIN, top + 14), text, 12, GREY, width=WIDTH - 2 * MARGIN)
    draw.rounded_rectangle((MARGIN, top + 30, MARGIN + 14, top + 44), 4, outline=MATCH, width=2)
    meaning = "Green frame: the image shows the concept that was asked for, or its own caption is the query."
    _text(draw, (MARGIN + 24, top + 38), meaning, 12, GREY, width=WIDTH - 2 * MARGIN - 24)


def _text(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    size: int,
    color: str,
    *,
    bold: bool = False,
    width: int,
) -> None:
    """One line of text, shortened to `width` pixels, its left middle at `position`."""
    font = _font(size, bold)
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(position, text, font=font, fill=color, anchor="lm")


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words that fit `width` pixels; a longer word is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the picture is the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
