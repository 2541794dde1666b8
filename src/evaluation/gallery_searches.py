"""The parts of the gallery page that show searches, in both directions, and the hardest negatives."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.gallery_content import Collection, ImageSearch, NegativeSide, TextSearch
from evaluation.gallery_markup import (
    RIGHT_MARK,
    alt_of,
    badge,
    bar,
    caption_line,
    decimal,
    file_key,
    pair_key,
    percent,
    plural,
    quoted,
    section,
)
from evaluation.hard_negatives import NEAR_DUPLICATE, HardNegative
from evaluation.thumbnails import Sprite


def text_section(collection: Collection, sprite: Sprite, searches: Sequence[TextSearch]) -> str:
    """Texts, and the images nearest to each; empty without any."""
    if not searches:
        return ""
    how = (
        f"Each text is compared with all {len(collection):,} images; the nearest are shown, nearest first, with their cosine "
        "similarity. ✓ and a green frame: the image shows the concept that was asked for, or its own caption is the text."
    )
    rows = "".join(_text_row(collection, sprite, search) for search in searches)
    return section("text-to-image", "Text → images", how, rows)


def _text_row(collection: Collection, sprite: Sprite, search: TextSearch) -> str:
    kind = "query" if search.own is None else "caption of the set"
    tiles = "".join(
        _tile(sprite, hit.image, collection.captions[hit.image], hit.similarity, "right" if hit.matches else "")
        for hit in search.hits
    )
    notes = "".join(f"<li>{note}</li>" for note in _ranks(search))
    return (
        f'<article class="row"><div class="asked"><p class="eyebrow">{kind}</p><h3>{quoted(search.query.text)}</h3>'
        f'<ul class="notes">{notes}</ul></div><ol class="tiles">{tiles}</ol></article>\n'
    )


def _ranks(search: TextSearch) -> list[str]:
    notes = [] if search.own_rank is None else [f"its own image at rank&nbsp;<b>{search.own_rank:,}</b>"]
    if search.first_right is None:
        notes.append("no image of the set is known to be right")
    elif search.own_rank is None or search.right > 1:
        notes.append(f"nearest of {plural(search.right, 'right image')} at rank&nbsp;<b>{search.first_right:,}</b>")
    return notes


def _tile(sprite: Sprite, pair: int, caption: str, similarity: float, kind: str = "") -> str:
    mark = RIGHT_MARK if kind == "right" else ""
    return (
        f'<li class="tile {kind}"><div class="frame">{sprite.show(pair_key(pair), alt_of(caption))}{mark}</div>'
        f'<p class="score">{decimal(similarity)}</p><p class="caption">{quoted(caption)}</p></li>'
    )


def image_section(
    collection: Collection, sprite: Sprite, searches: Sequence[ImageSearch], file_names: Sequence[str]
) -> str:
    """Images, and the captions nearest to each; empty without any. The names are those of the images from outside."""
    if not searches:
        return ""
    how = (
        f"Each image is compared with the {len(collection.distinct):,} different captions. "
        "✓: the caption is the image's own, or that of an image of the same concept."
    )
    cards = "".join(_image_card(collection, sprite, search, file_names) for search in searches)
    return section("image-to-text", "Image → captions", how, f'<div class="grid">{cards}</div>')


def _image_card(collection: Collection, sprite: Sprite, search: ImageSearch, file_names: Sequence[str]) -> str:
    if search.file is not None:
        key, kind, title, note = file_key(search.file), "image file", file_names[search.file], ""
    else:
        assert search.own is not None
        key, kind, title = pair_key(search.own), "image of the set", collection.captions[search.own]
        note = f'<p class="notes">own caption at rank&nbsp;<b>{search.own_rank:,}</b></p>'
    found = "".join(
        caption_line(
            collection.captions[hit.pair], hit.similarity, kind="right" if hit.matches else "", several=hit.pairs
        )
        for hit in search.hits
    )
    return (
        f'<article class="panel"><div class="head"><div class="frame">{sprite.show(key, alt_of(title))}</div>'
        f'<div><p class="eyebrow">{kind}</p><h3>{quoted(title)}</h3>{note}</div></div>'
        f'<ol class="lines">{found}</ol></article>\n'
    )


def negative_section(collection: Collection, sprite: Sprite, sides: tuple[NegativeSide, NegativeSide]) -> str:
    """The hardest negatives of images, and of captions."""
    how = (
        "Pairs that do not belong together and that the model finds more alike than those that do: for each anchor i the most "
        "similar candidate j with another caption, and of these the largest s<sub>ij</sub> − s<sub>ii</sub> (each anchor "
        "once). Some are mistakes of the model, some are false negatives, right in all but name: <b>same concept</b> and "
        f"<b>near-duplicate caption</b> (at least {100 * NEAR_DUPLICATE:.0f} % of the words of the two are in both) say which."
    )
    images, texts = sides
    number = len(collection)
    body = ""
    for side, title, anchor, build in (
        (images, "Images that prefer another caption", "image", _image_negative),
        (texts, "Captions that prefer another image", "caption", _text_negative),
    ):
        cards = "".join(build(collection, sprite, negative) for negative in side.listed)
        body += (
            f'<h3 class="sub">{title}</h3><p class="note">{plural(side.ahead, anchor)} of {number:,} '
            f"({percent(side.ahead / number)}) {'is' if side.ahead == 1 else 'are'} nearer to another than to the own "
            f"partner; {side.ahead_alike:,} of these others are of the same concept or have a near-duplicate caption.</p>"
            f'<div class="grid">{cards}</div>'
        )
    return section("negatives", "Hardest negatives", how, body)


def _alikeness(collection: Collection, negative: HardNegative) -> str:
    i, j = negative.anchor, negative.negative
    badges = [badge("same concept", "warn")] if collection.same_concept(i, j) else []
    if not badges and collection.alike(i, j):
        badges = [badge("near-duplicate caption", "warn")]
    margin = badge(f"s<sub>ij</sub> − s<sub>ii</sub> = {negative.margin:+.2f}".replace("-", "−"))
    return f'<p class="badges">{margin}{"".join(badges)}</p>'


def _image_negative(collection: Collection, sprite: Sprite, negative: HardNegative) -> str:
    own, other = (collection.captions[i] for i in (negative.anchor, negative.negative))
    lines = caption_line(own, negative.positive_similarity, kind="right", label="own caption")
    lines += caption_line(other, negative.negative_similarity, kind="wrong", label="nearer caption")
    return (
        f'<article class="panel"><div class="versus"><figure><div class="frame">'
        f"{sprite.show(pair_key(negative.anchor), alt_of(own))}</div><figcaption>the image</figcaption></figure>"
        f'<figure><div class="frame wrong">{sprite.show(pair_key(negative.negative), alt_of(other))}</div>'
        f'<figcaption>image of the nearer caption</figcaption></figure></div><ul class="lines">{lines}</ul>'
        f"{_alikeness(collection, negative)}</article>\n"
    )


def _text_negative(collection: Collection, sprite: Sprite, negative: HardNegative) -> str:
    own, other = (collection.captions[i] for i in (negative.anchor, negative.negative))
    figures = ""
    for kind, label, pair, caption, similarity in (
        ("right", "own image", negative.anchor, own, negative.positive_similarity),
        ("wrong", "nearer image", negative.negative, other, negative.negative_similarity),
    ):
        figures += (
            f'<figure><div class="frame {kind}">{sprite.show(pair_key(pair), alt_of(caption))}</div>'
            f'<figcaption>{label} <b class="score">{decimal(similarity)}</b>{bar(similarity)}</figcaption></figure>'
        )
    return (
        f'<article class="panel"><h4>{quoted(own)}</h4><div class="versus">{figures}</div>'
        f'<p class="note">The nearer image is called {quoted(other)}.</p>{_alikeness(collection, negative)}</article>\n'
    )
