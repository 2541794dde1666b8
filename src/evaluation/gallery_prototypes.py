"""The part of the gallery page that shows prototypes: how much each is used, and what is near it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from evaluation.gallery_content import Collection, Prototype, PrototypeSide
from evaluation.gallery_markup import alt_of, badge, caption_line, decimal, pair_key, percent, section, text_of
from evaluation.thumbnails import Sprite


def prototype_section(collection: Collection, sprite: Sprite, sides: tuple[PrototypeSide, PrototypeSide] | str) -> str:
    """W1 and W2, or the line that says why there are none."""
    if isinstance(sides, str):
        return section("prototypes", "Prototypes", text_of(sides, 300), "")
    how = (
        "NeuCLIP's network predicts each anchor's normalizer, a sum over the whole data set, from prototypes: W1 stands for "
        "all texts and is compared with images, W2 stands for all images and is compared with texts. The share of prototype "
        "j in the sum of anchor i is softmax<sub>j</sub>(cos(e<sub>i</sub>, W<sub>j</sub>)/τ). Shown are the prototypes with "
        f"the largest share, averaged over the {len(collection):,} anchors of this set at the run's τ, with the images and "
        "captions nearest to them. 1 × means an equal share."
    )
    first, second = sides
    body = _prototype_side(collection, sprite, first, "W1 stands for texts", "image")
    body += _prototype_side(collection, sprite, second, "W2 stands for images", "text")
    return section("prototypes", "What the prototypes stand for", how, body)


def _prototype_side(collection: Collection, sprite: Sprite, side: PrototypeSide, title: str, anchor: str) -> str:
    usage, most = side.usage, side.usage.shares.max().item()
    number = len(usage.shares)
    facts = (
        f"<li><b>{usage.effective:,.0f}</b> of {number:,} prototypes in effect (exp of the entropy of the shares)</li>"
        f"<li><b>{usage.effective_per_anchor:,.1f}</b> in effect for one {anchor} alone, on average</li>"
        f"<li>the most used has <b>{percent(most, 2)}</b> ({most * number:.1f} × an equal share)</li>"
    )
    cards = "".join(_prototype_card(collection, sprite, prototype, number) for prototype in side.top)
    return (
        f'<h3 class="sub">{title}</h3><div class="usage"><ul class="notes">{facts}</ul>{_histogram(side.histogram)}</div>'
        f'<div class="grid wide">{cards}</div>'
    )


def _prototype_card(collection: Collection, sprite: Sprite, prototype: Prototype, number: int) -> str:
    images = "".join(
        f'<li><div class="frame">{sprite.show(pair_key(i), alt_of(collection.captions[i]))}</div>'
        f'<p class="score">{decimal(similarity)}</p></li>'
        for i, similarity in prototype.images
    )
    captions = "".join(caption_line(collection.captions[i], similarity) for i, similarity in prototype.captions)
    return (
        f'<article class="panel"><div class="title"><h4>Prototype {prototype.number:,}</h4>'
        f"{badge(f'{100 * prototype.share:.2f} %')}{badge(f'{prototype.share * number:.1f} ×')}</div>"
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
        f'<text x="{4 + (power + half) * wide}" y="{base + 15}">{_multiple(power)}</text>'
        for power in range(-half + 1, half)
        if power % 2 == 0  # all of them would not fit
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


def _bins(half: int) -> list[str]:
    edges = [_multiple(power) for power in range(-half + 1, half)]
    return [f"below {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges)), f"{edges[-1]} and more"]
