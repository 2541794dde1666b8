"""Small images inside a page: each is in the page once, however often it is shown."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

SIDE = 128
# A drawing is smaller and sharper without loss, a photo is not: beyond this many bytes loss is accepted.
MOST_LOSSLESS_BYTES = 6000
QUALITY = 80


def encode_thumbnail(image: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """WebP of at most SIDE × SIDE pixels, never enlarged; a drawing without loss.

    Args:
        image: RGB, of any size.

    Returns:
        The file's bytes, and its width and height.
    """
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small = Image.frombytes(small.mode, small.size, small.tobytes())  # without the metadata of the original
    data = _webp(small, lossless=True)
    return data if len(data) <= MOST_LOSSLESS_BYTES else _webp(small, lossless=False), small.size


def _webp(image: Image.Image, lossless: bool) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=QUALITY, method=4)
    return file.getvalue()


class Sprite:
    """The images of a page, as symbols of one hidden SVG that all places refer to."""

    def __init__(self) -> None:
        self._symbols: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._symbols)

    def __contains__(self, key: str) -> bool:
        return key in self._symbols

    def add(self, key: str, image: Image.Image) -> None:
        """Put an image in, under a key made of letters and digits; again does nothing."""
        if key in self._symbols:
            return
        data, (width, height) = encode_thumbnail(image)
        source = "data:image/webp;base64," + base64.b64encode(data).decode("ascii")
        self._symbols[key] = (
            f'<symbol id="{key}" viewBox="0 0 {width} {height}">'
            f'<image href="{source}" width="{width}" height="{height}"/></symbol>'
        )

    def show(self, key: str, alt: str) -> str:
        """HTML that shows an image, with a text for who does not see it.

        Raises:
            KeyError: if the image is not in the sprite.
        """
        if key not in self._symbols:
            raise KeyError(key)
        text = escape(alt)
        return f'<svg class="pic" role="img" aria-label="{text}"><title>{text}</title><use href="#{key}"/></svg>'

    def html(self) -> str:
        """The hidden SVG with all images, for the beginning of the page."""
        return f'<svg class="sprite" width="0" height="0" aria-hidden="true">{"".join(self._symbols.values())}</svg>'
