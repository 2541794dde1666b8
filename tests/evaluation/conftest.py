"""Small data sets and a small run folder, made in a temporary place."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image, ImageDraw

TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

Sample = dict[str, bytes]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def image_bytes(seed: int, size: int = 32, format_name: str = "PNG") -> bytes:
    """A coloured disc that differs from seed to seed."""
    image = Image.new("RGB", (size, size), "white")
    color = ((seed * 67) % 200, (seed * 131) % 200, (seed * 29) % 200)
    ImageDraw.Draw(image).ellipse((seed % 7, seed % 5, size - 4, size - 3), fill=color)
    file = io.BytesIO()
    image.save(file, format_name)
    return file.getvalue()


def write_shard(path: Path, samples: Sequence[tuple[str, Sample]]) -> None:
    """A tar of (key, extension → bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def pair(seed: int, caption: str | None = None) -> Sample:
    """An image, a caption and a json with a concept."""
    facts = {"key": seed, "concept": f"disc {seed}"}
    return {
        "png": image_bytes(seed),
        "txt": (caption or f"disc {seed} icon").encode(),
        "json": json.dumps(facts).encode(),
    }


@pytest.fixture
def pair_shards(tmp_path: Path) -> str:
    """Three shards with 5, 7 and 11 pairs, gaps in the keys; the pattern that names them."""
    start = 0
    for number, size in enumerate((5, 7, 11)):
        samples = [
            (f"{3 * seed:09d}", pair(seed, "disc 0 icon" if seed == 9 else None)) for seed in range(start, start + size)
        ]
        write_shard(tmp_path / "pairs" / f"{number:05d}.tar", samples)
        start += size
    return f"{tmp_path}/pairs/{{00000..00002}}.tar"


@pytest.fixture
def classification_shards(tmp_path: Path) -> Path:
    """The shard layout: 6 classes, 13 images in two shards."""
    root = tmp_path / "shards"
    samples = [
        (f"s{seed:07d}", {"webp": image_bytes(seed, format_name="WEBP"), "cls": str(seed % 6).encode()})
        for seed in range(13)
    ]
    write_shard(root / "test" / "0.tar", samples[:8])
    write_shard(root / "test" / "1.tar", samples[8:])
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("".join(f"disc {label}\n" for label in range(6)))
    (root / "zeroshot_classification_templates.txt").write_text("{c} icon\na photo of {c}\n")
    return root


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name, epochs): a run folder with random weights of a tiny model of the folder's own configuration."""

    def make(name: str, epochs: Sequence[int] = (1, 2), model: str = "tiny-for-tests", width: int = 16) -> Path:
        folder = tmp_path / "logs" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "model_configs").mkdir()
        config = folder / "model_configs" / f"{model}.json"
        config.write_text(json.dumps({**TINY_MODEL, "embed_dim": width}))
        open_clip.add_model_config(config)
        for epoch in epochs:
            torch.manual_seed(epoch)
            weights = open_clip.create_model(model).state_dict()
            content = {"epoch": epoch, "name": name, "state_dict": weights}
            torch.save(content, folder / "checkpoints" / f"epoch_{epoch}.pt")
        params = {"model": model, "name": name, "objective": "openclip", "force_image_size": None, "lr": 1e-3}
        (folder / "params.txt").write_text("".join(f"{key}: {value}\n" for key, value in params.items()))
        return folder

    return make
