"""A small made-up data set in which captions tell what the pictures show, so that learning can be seen within seconds."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 50, 220),
    "yellow": (235, 220, 30),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
SHARD_SIZES = (50, 40, 60, 30, 20)
VALIDATION_SIZE = 37
CLASS_SAMPLES = 4

MODEL = "tiny"
MODEL_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Corpus:
    """Paths of the data set's parts.

    Attributes:
        folder: above all others.
        train: shards with brace expansion. validation: one shard. zeroshot: a folder in clip_benchmark's layout.
        table: a csv file of paths and captions. model_config: the tiny model's json.
        unnumbered: one shard of samples that carry no key.
    """

    folder: Path
    train: str
    validation: str
    zeroshot: str
    table: str
    model_config: str
    unnumbered: str

    @property
    def model(self) -> list[str]:
        """The flags that choose the tiny model."""
        return ["--model", MODEL, "--model-config", self.model_config]


def build_corpus(folder: Path) -> Corpus:
    """Write everything below `folder`: about 300 pictures of 32×32 pixels."""
    rng = np.random.default_rng(0)
    key = 0
    for number, size in enumerate(SHARD_SIZES):
        keys = []
        for _ in range(size):
            key += int(rng.integers(1, 4))  # keys with gaps, as they are left by downloads that failed
            keys.append(key)
        _write_pairs(folder / f"{number:05d}.tar", keys, rng)
    _write_pairs(folder / "validation.tar", list(range(VALIDATION_SIZE)), rng)
    _write_pairs(folder / "unnumbered.tar", [None] * 32, rng)
    _write_zeroshot(folder / "zeroshot", rng)
    _write_table(folder, rng)
    config = folder / f"{MODEL}.json"
    config.write_text(json.dumps(MODEL_CONFIG))
    return Corpus(
        folder=folder,
        train=f"{folder}/{{00000..{len(SHARD_SIZES) - 1:05d}}}.tar",
        validation=str(folder / "validation.tar"),
        zeroshot=str(folder / "zeroshot"),
        table=str(folder / "pairs.csv"),
        model_config=str(config),
        unnumbered=str(folder / "unnumbered.tar"),
    )


def picture(front: str, back: str, rng: np.random.Generator) -> Image.Image:
    """A square of one colour on another, with noise."""
    pixels = np.empty((32, 32, 3))
    pixels[:] = COLOURS[back]
    pixels[8:24, 8:24] = COLOURS[front]
    return Image.fromarray(np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8))


def _pairs(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    kinds = [pair for pair in product(COLOURS, COLOURS) if pair[0] != pair[1]]
    return [kinds[index] for index in rng.integers(0, len(kinds), count)]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_pairs(path: Path, keys: list[int | None], rng: np.random.Generator) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (key, (front, back)) in enumerate(zip(keys, _pairs(len(keys), rng))):
            name = f"{number if key is None else key:09d}"
            _add(tar, f"{name}.png", _png(picture(front, back, rng)))
            _add(tar, f"{name}.txt", f"a {front} square on {back}".encode())
            if key is not None:
                _add(tar, f"{name}.json", json.dumps({"key": key, "caption": f"a {front} square on {back}"}).encode())


def _write_zeroshot(folder: Path, rng: np.random.Generator) -> None:
    # The colour of the ground is what a short training learns first.
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in COLOURS))
    (folder / "zeroshot_classification_templates.txt").write_text("a green square on {c}\na yellow square on {c}\n")
    (folder / "test" / "nshards.txt").write_text("1\n")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number in range(CLASS_SAMPLES * len(COLOURS)):
            label = number % len(COLOURS)
            back = list(COLOURS)[label]
            front = "yellow" if back != "yellow" else "green"
            _add(tar, f"{number:05d}.png", _png(picture(front, back, rng)))
            _add(tar, f"{number:05d}.cls", str(label).encode())


def _write_table(folder: Path, rng: np.random.Generator) -> None:
    (folder / "pictures").mkdir()
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for number, (front, back) in enumerate(_pairs(32, rng)):
            path = folder / "pictures" / f"{number}.png"
            picture(front, back, rng).save(path)
            writer.writerow([path, f"a {front} square on {back}"])
