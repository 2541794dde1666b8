"""From an SVG file to the PNG of a square picture on white."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from building.rendering import LEAST_CONTRAST, Picture, encode, rasterize, worker_pool

if TYPE_CHECKING:
    from PIL.Image import Image

# White border around a drawing's canvas, as a share of its longer side. Some drawings reach past their canvas by up to
# 13 %: the next larger border is tried as long as something touches the picture's edge.
_MARGINS = (0.04, 0.08, 0.16)

_ROOT_TAG = re.compile(r"<svg\b[^>]*>")
_VIEW_BOX = re.compile(r"""\bviewBox\s*=\s*["']([^"']+)["']""")
_PLACEMENT = re.compile(r"""\s(?:width|height|viewBox|preserveAspectRatio)\s*=\s*(?:"[^"]*"|'[^']*')""")


@dataclass(frozen=True)
class Job:
    """One picture to make, with a side of `size` pixels."""

    path: Path
    size: int


def fit_square(svg: str, margin: float) -> str:
    """Give an SVG a square canvas with its drawing in the middle and a margin around.

    Args:
        svg: the text of an SVG file with a viewBox of any shape.
        margin: white border on each side, as a share of the longer side of the viewBox.
    Returns:
        The same text with a new viewBox, in which the drawing keeps its proportions.
    Raises:
        ValueError: no svg element, or none with a readable viewBox.
    """
    root = _ROOT_TAG.search(svg)
    view_box = _VIEW_BOX.search(root.group()) if root else None
    if root is None or view_box is None:
        raise ValueError("no svg element with a viewBox")
    left, top, width, height = (float(number) for number in re.split(r"[\s,]+", view_box.group(1).strip()))
    side = max(width, height) * (1 + 2 * margin)
    square = f"{left + (width - side) / 2:g} {top + (height - side) / 2:g} {side:g} {side:g}"
    tag = _PLACEMENT.sub("", root.group()).replace("<svg", f'<svg viewBox="{square}" width="100" height="100"', 1)
    return svg[: root.start()] + tag + svg[root.end() :]


def render(job: Job) -> Picture | None:
    """Render one drawing, black where it names no colour, on white.

    Returns:
        The picture, [size, size] pixels RGB; None for a drawing that is blank or that the renderer cannot read.
    """
    try:
        image = _draw(job)
    except ValueError:
        return None
    return encode(image)


def _draw(job: Job) -> "Image":
    svg = job.path.read_text(encoding="utf-8")
    for margin in _MARGINS:
        image = rasterize(fit_square(svg, margin), job.size)
        if not _touches_edge(image):
            break
    return image


def _touches_edge(image: "Image") -> bool:
    last = image.width - 1
    edges = [(0, 0, last + 1, 1), (0, last, last + 1, last + 1), (0, 0, 1, last + 1), (last, 0, last + 1, last + 1)]
    return any(low < 255 - LEAST_CONTRAST for edge in edges for low, _ in image.crop(edge).getextrema())


def render_all(jobs: Sequence[Job], workers: int) -> list[Picture | None]:
    """Render many drawings, in the order of the jobs whatever the number of worker processes."""
    with worker_pool(workers) as map_jobs:
        return map_jobs(render, jobs)
