"""From the icons of the package to pictures in a spool file: they are too many for the memory."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from building.rendering import Mapper, Picture, encode, rasterize

from .catalogue import Icon
from .package import Package

if TYPE_CHECKING:
    from PIL.Image import Image

_DEFAULT_SIDE = 16  # of a canvas that a set does not give, by the format's definition
THUMBNAIL_SIDE = 32
THUMBNAIL_LEVELS = 64  # of grey: sums of squares over a thumbnail stay below 2**24, where float32 is exact
_REPORT_EVERY = 20_000


@dataclass(frozen=True)
class Job:
    """One picture to make: the text of an SVG file, and the side in pixels."""

    svg: str
    size: int


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a picture's PNG is in the spool, a digest of its pixels, and its thumbnail: [32 * 32] uint8 below 64, grey."""

    offset: int
    length: int
    digest: str
    thumbnail: bytes


class Spool:
    """PNGs one after the other in a temporary file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._end = 0

    def add(self, picture: Picture, thumbnail: bytes) -> Stored:
        """Append a picture."""
        self._file.seek(self._end)
        self._file.write(picture.png)
        stored = Stored(self._end, len(picture.png), picture.digest, thumbnail)
        self._end += len(picture.png)
        return stored

    def read(self, stored: Stored) -> bytes:
        """Read a picture's PNG back."""
        self._file.seek(stored.offset)
        return self._file.read(stored.length)


def svg_text(data: dict, name: str) -> str:
    """Write an icon as an SVG file, on the canvas that its authors gave it.

    Args:
        data: a set's data; its left, top, width and height hold for icons without their own.
        name: the icon.
    """
    icon = data["icons"][name]
    defaults = {"left": 0, "top": 0, "width": _DEFAULT_SIDE, "height": _DEFAULT_SIDE}
    box = " ".join(str(icon.get(side, data.get(side, default))) for side, default in defaults.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="64" height="64" viewBox="{box}">{icon["body"]}</svg>'
    )


def render(job: Job) -> tuple[Picture, bytes] | None:
    """Render one icon.

    Returns:
        The picture and its thumbnail; None if it is blank or the renderer cannot read it.
    """
    try:
        image = rasterize(job.svg, job.size)
    except ValueError:
        return None
    picture = encode(image)
    return (picture, thumbnail(image)) if picture else None


def thumbnail(image: "Image") -> bytes:
    """Make a small grey picture for comparisons: [32 * 32] uint8 from 0, black, to 63, white."""
    from PIL import Image

    small = image.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return bytes(value * THUMBNAIL_LEVELS // 256 for value in small.tobytes())


def render_icons(
    package: Package, icons: Sequence[Icon], size: int, map_jobs: Mapper, spool: Spool
) -> list[Stored | None]:
    """Render icons set by set, so that few drawings are in memory at a time.

    Args:
        package: where the drawings are.
        icons: what to render.
        size: side of the pictures in pixels.
        map_jobs: applies a function to jobs, on several processes.
        spool: gets the PNGs.
    Returns:
        For every icon where its picture is; None if it shows nothing.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for index, icon in enumerate(icons):
        places[icon.prefix].append(index)
    stored: list[Stored | None] = [None] * len(icons)
    done = 0
    for prefix, data in package.icon_sets(set(places)):
        indices = places[prefix]
        made = map_jobs(render, [Job(svg_text(data, icons[index].name), size) for index in indices])
        for index, result in zip(indices, made):
            stored[index] = spool.add(*result) if result else None
        if (done + len(indices)) // _REPORT_EVERY > done // _REPORT_EVERY:
            print(f"rendered {done + len(indices):,} of {len(icons):,}", flush=True)
        done += len(indices)
    return stored
