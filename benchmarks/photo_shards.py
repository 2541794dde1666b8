"""Tar shards of made-up photographs with captions, for measuring loaders where no data set lies at hand.

A picture is noise in octaves (large shapes, small texture), a lit gradient, and polygons and discs with sharp edges, saved
as a JPEG of quality 90 with 4:2:0 chroma. Aspect ratios and bytes are like those of web photographs resized for training:
about 31 kB where the shortest side has 256 pixels and 115 kB at 512. A caption has 8 to 16 English words, some of them a
number, a name or with an apostrophe. All of it is a function of a seed.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

QUALITY = 90
_WORDS = re.findall(
    r"\S+",
    """
    a the of in on with and at near under above old young small large red blue green white black wooden stone metal glass man
    woman child dog cat horse bird boat car bicycle train street house church bridge river lake mountain forest beach field
    garden market kitchen table chair window door lamp book guitar flowers apples bread coffee sunset sunrise morning evening
    winter summer snow rain clouds sky standing sitting walking running holding looking riding wearing photographed
    illuminated traditional colourful abandoned neighbourhood skateboarder watercolour architecture it's don't man's 2019
    1950s 3D Paris Tokyo London Nairobi Vancouver café vintage poster stock photo isolated background closeup
    """,
)


def photograph(rng: np.random.Generator, shortest: int) -> Image.Image:
    """One picture in RGB with the given shortest side in pixels; aspect ratios from 1:2 to 2:1, 4:3 in the middle."""
    ratio = float(np.clip(np.exp(rng.normal(0.2, 0.25)), 0.5, 2.0))
    width, height = (round(shortest * ratio), shortest) if ratio >= 1 else (shortest, round(shortest / ratio))
    texture, shapes = np.zeros((height, width, 3), np.float32), _shapes(rng, width, height)
    cells, amplitude = 2, 1.0
    fading = rng.uniform(0.82, 0.98)
    while cells <= shortest // 2:
        # Most of what varies in a photograph varies in all colours at once.
        grid = rng.standard_normal((cells + 1, max(2, round(cells * width / height) + 1), 4)).astype(np.float32)
        coloured = 0.4 * grid[:, :, :3] + grid[:, :, 3:]
        for channel in range(3):
            octave = Image.fromarray(np.ascontiguousarray(coloured[:, :, channel]))
            texture[:, :, channel] += amplitude * np.asarray(octave.resize((width, height), Image.Resampling.BICUBIC))
        cells, amplitude = 2 * cells, fading * amplitude
    light = np.linspace(rng.uniform(-30, 30), rng.uniform(-30, 30), height, dtype=np.float32)[:, None, None]
    pixels = 0.55 * shapes + 60 + light + 22 * texture
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _shapes(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """[H, W, 3] float32: plain areas with sharp edges, 0 to 255."""
    canvas = Image.new("RGB", (width, height), tuple(map(int, rng.integers(40, 200, 3))))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(6, 16))):
        colour = tuple(map(int, rng.integers(0, 256, 3)))
        centre = rng.uniform(0, 1, 2) * (width, height)
        corners = centre + rng.normal(0, 0.2, (4, 2)) * (width, height)
        if rng.random() < 0.5:
            draw.polygon([tuple(corner) for corner in corners], fill=colour)
        else:
            radius = abs(rng.normal(0, 0.12)) * min(width, height)
            draw.ellipse([*(centre - radius), *(centre + radius)], fill=colour)
    return np.asarray(canvas, dtype=np.float32)


def jpeg(picture: Image.Image) -> bytes:
    """The file of a picture."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()


def caption(rng: np.random.Generator) -> str:
    """8 to 16 words."""
    words = [str(word) for word in rng.choice(_WORDS, int(rng.integers(8, 17)))]
    return " ".join([words[0].capitalize(), *words[1:]]) + str(rng.choice([".", "", "", "!"]))


def write_photo_shards(folder: Path, shortest: int, samples: int, shards: int, seed: int = 0) -> dict[str, float]:
    """Write `shards` tar files of `samples` in all, and sizes.json beside them, into a folder that is made.

    Returns:
        mean_bytes: of a picture's file. mean_pixels: of a picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes, files, pixels = {}, 0, 0
    for shard in range(shards):
        numbers = range(shard * samples // shards, (shard + 1) * samples // shards)
        sizes[f"{shard:05d}.tar"] = len(numbers)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in numbers:
                rng = np.random.default_rng([seed, number])
                picture = photograph(rng, shortest)
                content = jpeg(picture)
                files, pixels = files + len(content), pixels + picture.width * picture.height
                _add(tar, f"{number:09d}.jpg", content)
                _add(tar, f"{number:09d}.txt", caption(rng).encode())
                _add(tar, f"{number:09d}.json", json.dumps({"key": number}).encode())
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    return {"mean_bytes": files / samples, "mean_pixels": pixels / samples}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
