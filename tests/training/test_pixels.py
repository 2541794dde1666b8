"""uint8 pictures become, on the CPU, the very floats that torchvision's ToTensor and Normalize make of them."""

from __future__ import annotations

import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

from host_reads import no_host_synchronisation
from training.pixels import Pixels

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
CPU = torch.device("cpu")


def all_levels() -> torch.Tensor:
    """[2, 3, 16, 16] uint8, every level in every channel, channels last in memory."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    return torch.cat([levels.expand(1, 16, 16, 3), 255 - levels.expand(1, 16, 16, 3)]).contiguous().permute(0, 3, 1, 2)


def torchvision_floats(image: torch.Tensor) -> torch.Tensor:
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return torch.stack([transform(Image.fromarray(one.permute(1, 2, 0).contiguous().numpy())) for one in image])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_floats_are_torchvisions(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    image = all_levels()
    before = image.clone()
    found = Pixels(CPU, dtype, MEAN, STD, memory_format)(image)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.equal(found, torchvision_floats(image).to(dtype))
    assert torch.equal(image, before)


def test_a_part_of_a_batch_is_the_part_of_the_floats() -> None:
    pixels, image = Pixels(CPU, torch.float32, MEAN, STD), all_levels()
    assert torch.equal(torch.cat([pixels(part) for part in image.tensor_split(2)]), pixels(image))


def test_floats_are_only_moved() -> None:
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(Pixels(CPU, torch.float32, MEAN, STD)(image), image)
    assert torch.equal(Pixels(CPU, torch.bfloat16)(image), image.bfloat16())


def test_bytes_without_mean_and_std_are_an_error() -> None:
    with pytest.raises(ValueError, match="no mean and std"):
        Pixels(CPU, torch.float32)(all_levels())


def test_nothing_is_read_back() -> None:
    pixels, image = Pixels(CPU, torch.float32, MEAN, STD), all_levels()
    with no_host_synchronisation():
        pixels(image)
