"""Fixtures of the single-process tests of the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FeatureMaker = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def features() -> FeatureMaker:
    """features(seed, size, dim): unit-length image and text features whose matching pairs resemble each other."""

    def make(seed: int, size: int, dim: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(size, dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(2, size, dim, generator=generator, dtype=torch.float64)
        images, texts = F.normalize(shared + 0.7 * noise, dim=2).to(dtype)
        return images.requires_grad_(), texts.requires_grad_()

    return make
