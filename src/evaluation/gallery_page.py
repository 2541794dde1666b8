"""The gallery as one HTML page: no script, no request, every image inside; what others wrote is shown as text.

All text goes through `text_of` or `escape`. The content security policy allows data: images and the page's own style sheet
(by its hash) and nothing else, so that a caption could do nothing even if it were taken for markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from evaluation.gallery_content import (
    CaptionHit,
    Collection,
    ImageSearch,
    NegativeSide,
    Prototype,
    PrototypeSide,
    TextSearch,
)
from evaluation.gallery_style import STYLE
from evaluation.hard_negatives import NEAR_DUPLICATE, HardNegative
from evaluation.thumbnails import Sprite

# A longer caption is cut: it is there to be recognised.
LONGEST_TEXT = 160


class Heading(NamedTuple):
    """What the page is about.

    Attributes:
        run, objective, model: names.
        checkpoint: `epoch 3` or the like.
        data: where the pairs are from.
        temperature: τ.
        metrics, chance: as in evaluation.suite.Measured.
        made: how the page was made, one line.
    """

    run: str
    objective: str
    model: str
    checkpoint: str
    data: str
    temperature: float
    metrics: dict[str, float | None]
    chance: dict[str, float | None]
    made: str


class Content(NamedTuple):
    """What the page shows. `prototypes` is one line of text where there are none."""

    heading: Heading
    collection: Collection
    texts: list[TextSearch]
    images: list[ImageSearch]
    file_names: Sequence[str]
    negatives: tuple[NegativeSide, NegativeSide]
    prototypes: tuple[PrototypeSide, PrototypeSide] | str


def pair_key(i: int) -> str:
    """The sprite's key of the image of pair i."""
    return f"p{i}"


def file_key(number: int) -> str:
    """The sprite's key of an image from outside."""
    return f"f{number}"


def shown_pairs(content: Content) -> list[int]:
    """The pairs whose images the page shows, in order, each once."""
    shown: list[int] = []
    for text in content.texts:
        shown += [hit.image for hit in text.hits]
    shown += [image.own for image in content.images if image.own is not None]
    for side in content.negatives:
        shown += [i for negative in side.listed for i in (negative.anchor, negative.negative)]
    if not isinstance(content.prototypes, str):
        shown += [i for side in content.prototypes for prototype in side.top for i, _ in prototype.images]
    return sorted(set(shown))


def build_page(content: Content, sprite: Sprite) -> str:
    """The page.

    Args:
        content: what to show.
        sprite: with the images of `shown_pairs` under `pair_key`, and those from outside under `file_key`.

    Returns:
        HTML, the same for the same content.
    """
    sections = [
        _text_section(content, sprite) if content.texts else "",
        _image_section(content, sprite) if content.images else "",
        _negative_section(content, sprite),
        _prototype_section(content, sprite),
    ]
    title = f"{content.heading.run}: a look inside"
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{text_of(title)}</title>\n<style>{STYLE}</style>\n</head>\n'
        f'<body>\n<a class="skip" href="#main">Skip to content</a>\n{sprite.html()}\n'
        f"{_header(content)}\n{_navigation(content)}\n"
        f'<main id="main">\n{"".join(section for section in sections)}</main>\n{_footer(content, sprite)}\n</body>\n</html>\n'
    )


def text_of(text: str, longest: int = LONGEST_TEXT) -> str:
    """Text from outside as HTML: escaped, on one line, without control characters, cut if it is long."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return escape(plain if len(plain) <= longest else plain[: longest - 1].rstrip() + "…")


def _quoted(text: str) -> str:
    # bdi: a caption in a script that runs from right to left must not turn the text around it.
    return f"<bdi>{text_of(text)}</bdi>"


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _bar(similarity: float) -> str:
    """A thin bar as long as a cosine similarity; none below 0."""
    width = 100 * min(max(similarity, 0.0), 1.0)
    return (
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="4"/><rect class="fill" width="{width:.1f}" height="4"/></svg>'
    )


def _badge(text: str, kind: str = "") -> str:
    return f'<span class="badge {kind}">{text}</span>'


def _plural(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


# ── header, navigation, footer ───────────────────────────────────────────────


def _header(content: Content) -> str:
    heading, metrics, chance = content.heading, content.heading.metrics, content.heading.chance
    number = len(content.collection)
    facts = [
        ("Objective", heading.objective or "not said"),
        ("Model", heading.model),
        ("Checkpoint", heading.checkpoint),
        ("Temperature τ", f"{heading.temperature:.4g}"),
        ("Pairs", f"{number:,} from {heading.data}"),
        ("Different captions", f"{len(content.collection.distinct):,}"),
    ]
    cards = [
        _card("Image → text R@1", *_share(metrics, chance, "image_to_text_R@1")),
        _card("Text → image R@1", *_share(metrics, chance, "text_to_image_R@1")),
        _card(
            "Median rank of the partner",
            " / ".join(f"{metrics[f'retrieval/{way}_median_rank']:,.0f}" for way in ("image_to_text", "text_to_image")),
            f"image → text / text → image, of {number:,}",
        ),
    ]
    if not isinstance(content.prototypes, str):
        effective = " / ".join(f"{side.usage.effective:,.0f}" for side in content.prototypes)
        total = len(content.prototypes[0].usage.shares)
        cards.append(_card("Prototypes in use", effective, f"W1 / W2, effective number of {total:,}"))
    listed = "".join(f"<div><dt>{name}</dt><dd>{text_of(value)}</dd></div>" for name, value in facts)
    return (
        '<header class="top"><div class="wrap">\n<p class="eyebrow">A look inside a run</p>\n'
        f'<h1>{text_of(heading.run)}</h1>\n<dl class="facts">{listed}</dl>\n'
        f'<div class="cards">{"".join(cards)}</div>\n{_metric_table(content)}</div></header>'
    )


def _card(label: str, value: str, note: str) -> str:
    return f'<div class="card"><p class="label">{label}</p><p class="value">{value}</p><p class="note">{note}</p></div>'


def _share(metrics: dict[str, float | None], chance: dict[str, float | None], name: str) -> tuple[str, str]:
    value, guess = metrics[f"retrieval/{name}"], chance[f"retrieval/{name}"]
    factor = f"{value / guess:,.0f} × chance" if value is not None and guess else ""
    return _percent(value), factor


def _metric_table(content: Content) -> str:
    metrics, chance = content.heading.metrics, content.heading.chance
    names = ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
    rows = []
    for label, way, values in (
        ("Image → text", "image_to_text", metrics),
        ("Text → image", "text_to_image", metrics),
        ("Chance", "image_to_text", chance),
    ):
        cells = []
        for name in names:
            value = values[f"retrieval/{way}_{name}"]
            is_rank = name.endswith("rank") and value is not None
            cells.append(f"<td>{value:,.1f}</td>" if is_rank else f"<td>{_percent(value, 2)}</td>")
        rows.append(f'<tr><th scope="row">{label}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{name.replace("_", " ")}</th>' for name in names)
    return (
        "<details><summary>All retrieval metrics</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Retrieval metrics"><table><thead><tr><td></td>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">R@k: share of anchors whose own partner is among the k nearest of all pairs. '
        "For ranks lower is better.</p></details>"
    )


def _navigation(content: Content) -> str:
    links = [("text-to-image", "Text → images")] if content.texts else []
    links += [("image-to-text", "Image → captions")] if content.images else []
    links += [("negatives", "Hardest negatives"), ("prototypes", "Prototypes")]
    items = "".join(f'<li><a href="#{target}">{label}</a></li>' for target, label in links)
    return f'<nav aria-label="Sections"><ul class="wrap">{items}</ul></nav>'


def _footer(content: Content, sprite: Sprite) -> str:
    return (
        f'<footer class="wrap"><p>{text_of(content.heading.made, 400)}</p><p>One file with {_plural(len(sprite), "image")} '
        "inside: it runs no script, loads nothing and works offline. Images and captions belong to their makers.</p></footer>"
    )


def _section(name: str, title: str, how_to_read: str, body: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><div class="wrap"><h2 id="{name}-title">{title}</h2>\n'
        f'<p class="how">{how_to_read}</p>\n{body}</div></section>\n'
    )


# ── searches ─────────────────────────────────────────────────────────────────


def _text_section(content: Content, sprite: Sprite) -> str:
    how = (
        f"Each text is compared with all {len(content.collection):,} images; the nearest are shown, nearest first, with their "
        "cosine similarity. ✓ and a green frame: the image shows the concept that was asked for, or its own caption is the text."
    )
    rows = "".join(_text_row(content.collection, sprite, search) for search in content.texts)
    return _section("text-to-image", "Text → images", how, rows)


def _text_row(collection: Collection, sprite: Sprite, search: TextSearch) -> str:
    if search.first_right is None:
        found = "no image of the set is known to be right"
    else:
        found = f"nearest right image at rank <b>{search.first_right:,}</b> ({search.right:,} of the set are right)"
    own = "" if search.own_rank is None else f"<li>its own image at rank <b>{search.own_rank:,}</b></li>"
    kind = "query" if search.own is None else "caption of the set"
    tiles = "".join(
        _tile(sprite, hit.image, collection.captions[hit.image], hit.similarity, "right" if hit.matches else "")
        for hit in search.hits
    )
    return (
        f'<article class="row"><div class="asked"><p class="eyebrow">{kind}</p><h3>{_quoted(search.query.text)}</h3>'
        f'<ul class="notes">{own}<li>{found}</li></ul></div><ol class="tiles">{tiles}</ol></article>\n'
    )


def _tile(sprite: Sprite, pair: int, caption: str, similarity: float, kind: str = "") -> str:
    mark = '<span class="mark">✓<span class="hidden"> right</span></span>' if kind == "right" else ""
    return (
        f'<li class="tile {kind}"><div class="frame">{sprite.show(pair_key(pair), _alt(caption))}{mark}</div>'
        f'<p class="score">{_number(similarity)}</p><p class="caption">{_quoted(caption)}</p></li>'
    )


def _alt(caption: str) -> str:
    """What an image is called where it cannot be seen: its caption, which is not escaped here."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in caption).split())
    return (plain or "image without a caption")[:LONGEST_TEXT]


def _image_section(content: Content, sprite: Sprite) -> str:
    how = (
        f"Each image is compared with the {len(content.collection.distinct):,} different captions. "
        "✓: the caption is the image's own, or that of an image of the same concept."
    )
    cards = "".join(_image_card(content, sprite, search) for search in content.images)
    return _section("image-to-text", "Image → captions", how, f'<div class="grid">{cards}</div>')


def _image_card(content: Content, sprite: Sprite, search: ImageSearch) -> str:
    collection = content.collection
    if search.own is None:
        assert search.file is not None
        name = content.file_names[search.file]
        picture, kind, title, note = sprite.show(file_key(search.file), _alt(name)), "image file", name, ""
    else:
        title = collection.captions[search.own]
        picture, kind = sprite.show(pair_key(search.own), _alt(title)), "image of the set"
        note = f'<p class="notes">own caption at rank <b>{search.own_rank:,}</b></p>'
    found = "".join(_caption_line(collection, hit) for hit in search.hits)
    return (
        f'<article class="panel"><div class="head"><div class="frame">{picture}</div><div><p class="eyebrow">{kind}</p>'
        f'<h3>{_quoted(title)}</h3>{note}</div></div><ol class="lines">{found}</ol></article>\n'
    )


def _caption_line(collection: Collection, hit: CaptionHit) -> str:
    mark = '<span class="mark">✓<span class="hidden"> right</span></span>' if hit.matches else ""
    several = f' <span class="note">in {hit.pairs:,} pairs</span>' if hit.pairs > 1 else ""
    return (
        f'<li class="line {"right" if hit.matches else ""}"><span class="said">{_quoted(collection.captions[hit.pair])}'
        f'{several}{mark}</span><span class="score">{_number(hit.similarity)}</span>{_bar(hit.similarity)}</li>'
    )


# ── hardest negatives ────────────────────────────────────────────────────────


def _negative_section(content: Content, sprite: Sprite) -> str:
    how = (
        "Pairs that do not belong together and that the model finds more alike than those that do: for each anchor i the most "
        "similar candidate j with another caption, and of these the largest s<sub>ij</sub> − s<sub>ii</sub> (each anchor "
        "once). Some are mistakes of the model, some are false negatives, right in all but name: <b>same concept</b> and "
        f"<b>near-duplicate caption</b> (at least {100 * NEAR_DUPLICATE:.0f} % of the words of the two are in both) say which."
    )
    images, texts = content.negatives
    number = len(content.collection)
    body = ""
    for side, title, anchor, build in (
        (images, "Images that prefer another caption", "image", _image_negative),
        (texts, "Captions that prefer another image", "caption", _text_negative),
    ):
        cards = "".join(build(content.collection, sprite, negative) for negative in side.listed)
        body += (
            f'<h3 class="sub">{title}</h3><p class="note">{_plural(side.ahead, anchor)} of {number:,} '
            f"({_percent(side.ahead / number)}) {'is' if side.ahead == 1 else 'are'} nearer to another than to the own "
            f"partner; {side.ahead_alike:,} of these others are of the same concept or have a near-duplicate caption.</p>"
            f'<div class="grid">{cards}</div>'
        )
    return _section("negatives", "Hardest negatives", how, body)


def _alikeness(collection: Collection, negative: HardNegative) -> str:
    i, j = negative.anchor, negative.negative
    badges = [_badge("same concept", "warn")] if collection.same_concept(i, j) else []
    if not badges and collection.alike(i, j):
        badges = [_badge("near-duplicate caption", "warn")]
    margin = _badge(f"s<sub>ij</sub> − s<sub>ii</sub> = {negative.margin:+.2f}".replace("-", "−"))
    return f'<p class="badges">{margin}{"".join(badges)}</p>'


def _image_negative(collection: Collection, sprite: Sprite, negative: HardNegative) -> str:
    own, other = (collection.captions[i] for i in (negative.anchor, negative.negative))
    lines = ""
    for kind, label, caption, similarity in (
        ("right", "own caption", own, negative.positive_similarity),
        ("wrong", "nearer caption", other, negative.negative_similarity),
    ):
        lines += (
            f'<li class="line {kind}"><span class="said"><span class="eyebrow">{label}</span>{_quoted(caption)}</span>'
            f'<span class="score">{_number(similarity)}</span>{_bar(similarity)}</li>'
        )
    return (
        f'<article class="panel"><div class="versus"><figure><div class="frame">'
        f"{sprite.show(pair_key(negative.anchor), _alt(own))}</div><figcaption>the image</figcaption></figure>"
        f'<figure><div class="frame wrong">{sprite.show(pair_key(negative.negative), _alt(other))}</div>'
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
            f'<figure><div class="frame {kind}">{sprite.show(pair_key(pair), _alt(caption))}</div>'
            f'<figcaption>{label} <b class="score">{_number(similarity)}</b>{_bar(similarity)}</figcaption></figure>'
        )
    return (
        f'<article class="panel"><h4>{_quoted(own)}</h4><div class="versus">{figures}</div>'
        f'<p class="note">The nearer image is called {_quoted(other)}.</p>{_alikeness(collection, negative)}</article>\n'
    )


# ── prototypes ───────────────────────────────────────────────────────────────


def _prototype_section(content: Content, sprite: Sprite) -> str:
    if isinstance(content.prototypes, str):
        return _section("prototypes", "Prototypes", text_of(content.prototypes), "")
    how = (
        "NeuCLIP's network predicts each anchor's normalizer, a sum over the whole data set, from prototypes: W1 stands for "
        "all texts and is compared with images, W2 stands for all images and is compared with texts. The share of prototype j "
        "in the sum of anchor i is softmax<sub>j</sub>(cos(e<sub>i</sub>, W<sub>j</sub>)/τ); shown are the prototypes with the "
        f"largest share, averaged over the {len(content.collection):,} anchors of this set at the run's τ, with the images and "
        "captions nearest to them. 1 × means an equal share."
    )
    first, second = content.prototypes
    body = _prototype_side(content, sprite, first, "W1 stands for texts", "image")
    body += _prototype_side(content, sprite, second, "W2 stands for images", "text")
    return _section("prototypes", "What the prototypes stand for", how, body)


def _prototype_side(content: Content, sprite: Sprite, side: PrototypeSide, title: str, anchor: str) -> str:
    usage = side.usage
    number = len(usage.shares)
    facts = (
        f"<li><b>{usage.effective:,.0f}</b> of {number:,} prototypes in effect (exp of the entropy of the shares)</li>"
        f"<li><b>{usage.effective_per_anchor:,.1f}</b> in effect for one {anchor} alone, on average</li>"
        f"<li>the most used has <b>{_percent(usage.shares.max().item(), 2)}</b> "
        f"({usage.shares.max().item() * number:.1f} × an equal share)</li>"
    )
    cards = "".join(_prototype_card(content.collection, sprite, prototype, number) for prototype in side.top)
    return (
        f'<h3 class="sub">{title}</h3><div class="usage"><ul class="notes">{facts}</ul>{_histogram(side.histogram)}</div>'
        f'<div class="grid wide">{cards}</div>'
    )


def _prototype_card(collection: Collection, sprite: Sprite, prototype: Prototype, number: int) -> str:
    images = "".join(
        f'<li><div class="frame">{sprite.show(pair_key(i), _alt(collection.captions[i]))}</div>'
        f'<p class="score">{_number(similarity)}</p></li>'
        for i, similarity in prototype.images
    )
    captions = "".join(
        f'<li class="line"><span class="said">{_quoted(collection.captions[i])}</span>'
        f'<span class="score">{_number(similarity)}</span>{_bar(similarity)}</li>'
        for i, similarity in prototype.captions
    )
    return (
        f'<article class="panel"><div class="title"><h4>Prototype {prototype.number:,}</h4>'
        f"{_badge(f'{100 * prototype.share:.2f} %')}{_badge(f'{prototype.share * number:.1f} ×')}</div>"
        f'<p class="eyebrow">nearest images</p><ol class="small">{images}</ol>'
        f'<p class="eyebrow">nearest captions</p><ol class="lines">{captions}</ol></article>\n'
    )


def _histogram(counts: Sequence[int]) -> str:
    """Numbers of prototypes by share, as bars; the axis is in doublings of an equal share."""
    half = len(counts) // 2
    wide, height, base = 34, 84, 104
    bars = ""
    for place, count in enumerate(counts):
        tall = height * count / max(counts)
        left = 4 + place * wide
        bars += (
            f'<rect class="fill" x="{left + 2}" y="{base - tall:.1f}" width="{wide - 4}" height="{tall:.1f}" rx="2"/>'
            f'<text x="{left + wide / 2}" y="{base - tall - 4:.1f}">{count or ""}</text>'
        )
    edges = "".join(
        f'<text class="axis" x="{4 + place * wide}" y="{base + 15}">{label}</text>' for place, label in _edges(half)
    )
    width = 8 + wide * len(counts)
    said = "; ".join(f"{label}: {count}" for label, count in zip(_bins(half), counts) if count)
    return (
        f'<figure class="histogram"><svg viewBox="0 0 {width} {base + 22}" role="img" '
        f'aria-label="Prototypes by share, in multiples of an equal share. {said}">{bars}'
        f'<line x1="4" y1="{base}" x2="{width - 4}" y2="{base}"/>{edges}</svg>'
        "<figcaption>prototypes by share, in multiples of an equal share</figcaption></figure>"
    )


def _multiple(power: int) -> str:
    return f"{2**power}×" if power >= 0 else f"1/{2**-power}×"


def _edges(half: int) -> Iterable[tuple[int, str]]:
    """Place and label of the histogram's inner edges."""
    return ((power + half, _multiple(power)) for power in range(-half + 1, half))


def _bins(half: int) -> list[str]:
    edges = [_multiple(power) for power in range(-half + 1, half)]
    return [f"below {edges[0]}", *(f"{low} to {high}" for low, high in zip(edges, edges[1:])), f"{edges[-1]} and more"]
