"""A copy of nested content in host memory, taken quickly: what is written from it later does not see training go on."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Buffers in host memory that are filled anew at each copy, page-locked for what comes from a GPU.

    A copy is valid until the next one is taken. The buffers keep their memory, as much as all tensors copied: to allocate
    it anew would take longer than to fill it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._used: dict[tuple[Any, ...], Tensor] = {}
        self._copies: dict[tuple[Any, ...], Tensor] = {}

    def take(self, content: Any) -> Any:
        """Copy nested dicts, lists and tuples; nothing of the copy is shared with `content`. The host waits once per GPU.

        Returns:
            The same with every tensor in host memory. Tensors that were one in `content` (tied weights) are one in it, too.
        """
        self._used, self._copies = {}, {}
        devices: set[torch.device] = set()
        copied = self._copy(content, (), devices)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        # What the content no longer has, such as the state of an objective's earlier phase, is freed.
        self._buffers, self._used, self._copies = self._used, {}, {}
        return copied

    def _copy(self, part: Any, place: tuple[Any, ...], devices: set[torch.device]) -> Any:
        if isinstance(part, Tensor):
            return self._copy_tensor(part.detach(), place, devices)
        if isinstance(part, dict):
            items = ((key, self._copy(value, (*place, key), devices)) for key, value in part.items())
            if not isinstance(part, OrderedDict):
                return dict(items)
            copied = OrderedDict(items)
            if hasattr(part, "_metadata"):  # a module's state dict: the versions of its parts
                copied._metadata = part._metadata  # type: ignore[attr-defined]
            return copied
        if isinstance(part, list | tuple):
            return type(part)([self._copy(value, (*place, number), devices) for number, value in enumerate(part)])
        return part

    def _copy_tensor(self, tensor: Tensor, place: tuple[Any, ...], devices: set[torch.device]) -> Tensor:
        layout = (tensor.dtype, tuple(tensor.shape), tensor.stride())
        identity = (tensor.device, tensor.data_ptr(), *layout)
        if tensor.numel() > 0 and identity in self._copies:
            return self._copies[identity]
        buffer = self._buffers.get(place)
        from_gpu = tensor.device.type == "cuda"
        if buffer is None or (buffer.dtype, tuple(buffer.shape), buffer.stride()) != layout:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=from_gpu)
        if from_gpu:
            devices.add(tensor.device)
        buffer.copy_(tensor, non_blocking=from_gpu)
        self._used[place] = self._copies[identity] = buffer
        return buffer
