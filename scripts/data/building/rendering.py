"""From SVG text to the PNG of a square picture on white, on several processes."""

import functools
import hashlib
import io
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# A picture whose darkest and lightest values are closer than this in every channel (of 255) shows nothing.
LEAST_CONTRAST = 24

# Applies a function to every job, in the order of the jobs.
Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class Picture:
    """A finished picture: the PNG file's bytes (RGB, 8 bits) and a digest of its pixels."""

    png: bytes
    digest: str


def rasterize(svg: str, size: int) -> "Image":
    """Draw an SVG on white, black where it names no colour.

    Args:
        svg: the text of an SVG file with a square canvas.
        size: side of the picture in pixels.
    Returns:
        The picture, [size, size] pixels RGB.
    Raises:
        ValueError: the renderer cannot read it.
    """
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def encode(image: "Image") -> Picture | None:
    """Encode an RGB image as PNG; None if it is blank."""
    if max(high - low for low, high in image.getextrema()) < LEAST_CONTRAST:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Picture(buffer.getvalue(), hashlib.md5(image.tobytes(), usedforsecurity=False).hexdigest())


@contextmanager
def worker_pool(workers: int) -> Iterator[Mapper]:
    """Open a pool of worker processes; what it gives maps a function over jobs, the same whatever their number."""
    if workers == 1:
        yield lambda function, jobs: [function(job) for job in jobs]
        return
    # A worker that is just being forked would lose the signal of terminate(), and waiting for it would never end: it is kept
    # until the worker is ready for it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        pool = multiprocessing.Pool(workers, initializer=_end_when_told)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield functools.partial(pool.map, chunksize=64)
        pool.close()
    except BaseException:
        pool.terminate()
        raise
    pool.join()


def _end_when_told() -> None:
    # The builder's own handlers, which clean up, came along with the fork.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The builder ends its workers: when they ended by themselves it would start others.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
