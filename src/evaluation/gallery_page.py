"""The gallery as one HTML page: no script, no request, every image inside; what others wrote is shown as text.

All text from outside goes through gallery_markup.text_of. The content security policy allows data: images, the page's own
style sheet (by its hash) and nothing else, so that a caption could do nothing even if it were taken for markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from evaluation.gallery_content import Collection, ImageSearch, NegativeSide, PrototypeSide, TextSearch
from evaluation.gallery_markup import percent, plural, text_of
from evaluation.gallery_prototypes import prototype_section
from evaluation.gallery_searches import image_section, negative_section, text_section
from evaluation.gallery_style import STYLE
from evaluation.thumbnails import Sprite


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
    collection = content.collection
    sections = [
        text_section(collection, sprite, content.texts),
        image_section(collection, sprite, content.images, content.file_names),
        negative_section(collection, sprite, content.negatives),
        prototype_section(collection, sprite, content.prototypes),
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
        f'<main id="main">\n{"".join(sections)}</main>\n{_footer(content, sprite)}\n</body>\n</html>\n'
    )


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


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
    return percent(value), factor


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
            cells.append(f"<td>{value:,.1f}</td>" if is_rank else f"<td>{percent(value, 2)}</td>")
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
        f'<footer class="wrap"><p>{text_of(content.heading.made, 400)}</p><p>One file with {plural(len(sprite), "image")} '
        "inside: it runs no script, loads nothing and works offline. Images and captions belong to their makers.</p></footer>"
    )
