"""From an SVG file to the PNG of a square picture on white."""

import hashlib
import io
import multiprocessing
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

# White border around a drawing's canvas, as a share of its longer side. Some drawings reach past their canvas by up to
# 13 %: the next larger border is tried as long as something touches the picture's edge.
_MARGINS = (0.04, 0.08, 0.16)

# A picture whose darkest and lightest values are closer than this in every channel (of 255) shows nothing.
_LEAST_CONTRAST = 24

_ROOT_TAG = re.compile(r"<svg\b[^>]*>")
_VIEW_BOX = re.compile(r"""\bviewBox\s*=\s*["']([^"']+)["']""")
_PLACEMENT = re.compile(r"""\s(?:width|height|viewBox|preserveAspectRatio)\s*=\s*(?:"[^"]*"|'[^']*')""")


@dataclass(frozen=True)
class Job:
    """One picture to make, with a side of `size` pixels."""

    path: Path
    size: int


@dataclass(frozen=True)
class Picture:
    """A finished picture: the PNG file's bytes (RGB, 8 bits) and a digest of its pixels."""

    png: bytes
    digest: str


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
    if max(high - low for low, high in image.getextrema()) < _LEAST_CONTRAST:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Picture(buffer.getvalue(), hashlib.md5(image.tobytes(), usedforsecurity=False).hexdigest())


def _draw(job: Job) -> "Image":
    import resvg_py
    from PIL import Image

    svg = job.path.read_text(encoding="utf-8")
    for margin in _MARGINS:
        png = resvg_py.svg_to_bytes(
            svg_string=fit_square(svg, margin),
            width=job.size,
            height=job.size,
            background="#ffffff",
            skip_system_fonts=True,
        )
        image = Image.open(io.BytesIO(png)).convert("RGB")
        if not _touches_edge(image):
            break
    return image


def _touches_edge(image: "Image") -> bool:
    last = image.width - 1
    edges = [(0, 0, last + 1, 1), (0, last, last + 1, last + 1), (0, 0, 1, last + 1), (last, 0, last + 1, last + 1)]
    return any(low < 255 - _LEAST_CONTRAST for edge in edges for low, _ in image.crop(edge).getextrema())


def render_all(jobs: Sequence[Job], workers: int) -> list[Picture | None]:
    """Render many drawings, in the order of the jobs whatever the number of worker processes."""
    if workers == 1:
        return [render(job) for job in jobs]
    pool = multiprocessing.Pool(workers, initializer=_end_at_sigterm)
    try:
        pictures = pool.map(render, jobs, chunksize=64)
        # Not terminate(), as at the end of a with block: a worker that is just being forked loses the signal, and waiting for
        # it would never end.
        pool.close()
    except BaseException:
        pool.terminate()
        raise
    pool.join()
    return pictures


def _end_at_sigterm() -> None:
    # The builder's own handler, which cleans up, came along with the fork.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
