"""A small model with the interface of an open_clip model, for processes that start from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transform import image_transform
from torch import Tensor, nn

from evaluation.datacomp.measure import TaskModel, measure_task
from evaluation.datacomp.tasks import TASKS
from evaluation.ranks import Place
from evaluation.suite import Setting

WIDTH = 24


class SmallModel(nn.Module):
    """Colours of an 8×8 grid on one side, hashed words on the other; counts how many images it encodes."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.colours = nn.Parameter(torch.randn(3 * 64, WIDTH, generator=generator))
        self.words = nn.Parameter(torch.randn(997, WIDTH, generator=generator))
        self.images_seen = 0

    def encode_image(self, image: Tensor) -> Tensor:
        self.images_seen += len(image)
        return F.adaptive_avg_pool2d(image, 8).flatten(1) @ self.colours

    def encode_text(self, text: Tensor) -> Tensor:
        return (F.embedding(text, self.words) * (text > 0)[..., None]).sum(1)


def tokenize(texts: list[str]) -> Tensor:
    """[B, 12] int64; the same in every process."""
    rows = [[1 + sum(ord(c) * 31**i for i, c in enumerate(word)) % 996 for word in text.split()] for text in texts]
    return torch.tensor([(row + [0] * 12)[:12] for row in rows], dtype=torch.int64)


def small_task_model(**setting: Any) -> TaskModel:
    """A `TaskModel` of a `SmallModel`; arguments are those of `Setting`."""
    preprocess = image_transform(
        32, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    place = Place(setting.get("rank", 0), setting.get("world_size", 1), torch.device("cpu"))
    setting = {"batch_size": 4, "together": place.together, **setting}
    return TaskModel(SmallModel().eval(), preprocess, tokenize, Setting(**setting))


def measure_on_this_rank(runs: list[tuple[str, list[str]]]) -> list[dict[str, dict[str, Any] | str]]:
    """For every (data folder, task keys): key → metrics, or the message of the error that ended the task.

    One of several gloo ranks calls it.
    """
    model = small_task_model(rank=dist.get_rank(), world_size=dist.get_world_size())
    results: list[dict[str, dict[str, Any] | str]] = []
    for data_dir, keys in runs:
        results.append({})
        for key in keys:
            try:
                results[-1][key] = measure_task(TASKS[key], Path(data_dir), model)
            except ValueError as error:
                results[-1][key] = str(error)
    return results


def crash_on_the_last_rank() -> list[str]:
    """What each rank learns when one fails with an error that is no user's mistake, and that all go on after it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = small_task_model(rank=rank, world_size=world_size)
    heard = []
    for divisor in (world_size - 1 - rank, 1):
        try:
            heard.append(str(model.together(lambda divisor=divisor: 1 // divisor)))
        except (ValueError, ArithmeticError) as error:
            heard.append(f"{type(error).__name__}: {error}")
    return heard
