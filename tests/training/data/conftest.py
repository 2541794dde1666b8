"""Small shards made on the spot: sample number i has i in its pixels, in its caption and as its key."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import DataConfig, TrainLoader, build_train_loader

Members = list[tuple[str, bytes]]


def plain_preprocess(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def noisy_preprocess(image: Image.Image) -> torch.Tensor:
    noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
    return plain_preprocess(image) + noise / 10


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[int(caption.split()[-1])] for caption in captions], dtype=torch.int32)


def numbers_in(image: torch.Tensor) -> list[int]:
    pixels = image[:, :, 0, 0].round().long()
    return (pixels[:, 0] * 65536 + pixels[:, 1] * 256 + pixels[:, 2]).tolist()


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (2, 2), (number >> 16, number >> 8 & 255, number & 255)).save(data, kind)
    return data.getvalue()


def members_of(number: int) -> Members:
    key = number if number % 2 else f"{number:012d}"
    return [
        (f"{number:06d}.png", image_bytes(number)),
        (f"{number:06d}.txt", f"picture {number}".encode()),
        (f"{number:06d}.json", json.dumps({"key": key}).encode()),
    ]


def write_tar(path: Path, samples: Iterable[Members]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in (member for members in samples for member in members):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: Sequence[int], first: int = 0) -> list[Path]:
    paths = []
    for index, size in enumerate(sizes):
        paths.append(write_tar(folder / f"{index:05d}.tar", map(members_of, range(first, first + size))))
        first += size
    return paths


def open_ranks(config: DataConfig, world_size: int, preprocess: Callable = plain_preprocess) -> list[TrainLoader]:
    return [build_train_loader(config, preprocess, tokenize, rank, world_size, False) for rank in range(world_size)]


def seen_keys(loader: TrainLoader, epoch: int) -> list[int]:
    """Keys in the order delivered, after checking the shapes, the number of batches, and that image, text and key match."""
    keys: list[int] = []
    steps = 0
    for batch in loader.epoch(epoch):
        steps += 1
        assert batch.image.dtype == torch.float32
        assert batch.image.shape[1:] == (3, 2, 2)
        assert batch.text.dtype == torch.int64
        assert batch.keys is not None
        assert batch.keys.dtype == torch.int64
        assert batch.keys.tolist() == batch.text[:, 0].tolist() == numbers_in(batch.image)
        keys += batch.keys.tolist()
    assert steps == loader.steps_per_epoch
    return keys


class Kit:
    """The functions above, for test modules to use."""

    plain_preprocess = staticmethod(plain_preprocess)
    noisy_preprocess = staticmethod(noisy_preprocess)
    tokenize = staticmethod(tokenize)
    image_bytes = staticmethod(image_bytes)
    members_of = staticmethod(members_of)
    write_tar = staticmethod(write_tar)
    write_shards = staticmethod(write_shards)
    open_ranks = staticmethod(open_ranks)
    seen_keys = staticmethod(seen_keys)

    @staticmethod
    def config(data: Path | str | None, **flags: object) -> DataConfig:
        defaults: dict = {"workers": 0, "batch_size": 4, "needs_keys": True}
        return DataConfig(None if data is None else str(data), **(defaults | flags))


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def sizes_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards too large to be counted."""
    monkeypatch.setattr("training.data.sizes.COUNTED_BYTES", 0)
