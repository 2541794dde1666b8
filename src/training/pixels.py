"""Images as the loader hands them over become images as the towers take them, once per batch, on the device.

Pixels travel as uint8: a quarter of the bytes of float32 through shared memory, pinned memory and the bus, and no
arithmetic on floats in the loader's workers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Pixels:
    """What is done to each batch's images. Nothing here waits for the device.

    Args:
        device: where the towers are.
        dtype: what the towers take. The arithmetic is in float32 whatever this is.
        mean, std: of each channel, for values in [0, 1]; None where the loader delivers images that are normalised already.
        memory_format: how images lie in memory before the towers: torch.contiguous_format or torch.channels_last.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.memory_format = memory_format
        self.mean, self.std = (
            None if values is None else torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
            for values in (mean, std)
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Images on the device, normalised.

        The operations and their order are those of torchvision's ToTensor and Normalize: on the CPU the floats are the same.

        Args:
            image: [B, 3, H, W] uint8 in any memory format, or floats, which are only moved. Anywhere, best in pinned memory.

        Returns:
            [B, 3, H, W] of the dtype asked for.

        Raises:
            ValueError: uint8 without mean and std.
        """
        if image.dtype != torch.uint8:
            return image.to(self.device, dtype=self.dtype, non_blocking=True, memory_format=self.memory_format)
        if self.mean is None or self.std is None:
            raise ValueError("images come as uint8, but no mean and std to normalise them by were given")
        # Two steps: in one, the host would make floats first and send four times the bytes.
        pixels = image.to(self.device, non_blocking=True).to(torch.float32, memory_format=self.memory_format)
        return pixels.div_(255).sub_(self.mean).div_(self.std).to(self.dtype)
