"""The two collectives that evaluation needs, right for uneven shares, and a guard for exact float32 scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _collective_device(tensor: Tensor) -> torch.device:
    """Where the default process group can take `tensor`: nccl wants a GPU, gloo the CPU."""
    backend = dist.get_backend()
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else tensor.device


def all_reduce_sum(tensor: Tensor, world_size: int) -> Tensor:
    """Sum a tensor over the ranks.

    Args:
        tensor: any shape, the same on every rank; left as it is.
        world_size: number of ranks; with 1 no process group is needed.

    Returns:
        The sum, on the device of `tensor`; `tensor` itself on one rank.
    """
    if world_size == 1:
        return tensor
    total = tensor.detach().to(_collective_device(tensor), copy=True).contiguous()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total.to(tensor.device)


def gather_rows(rows: Tensor, world_size: int) -> Tensor:
    """Concatenate the rows of all ranks in rank order, whatever number of rows each rank holds.

    Args:
        rows: [n, d], n different on each rank and possibly 0 (then d may be 0 too); one dtype on all ranks.
        world_size: number of ranks; with 1 no process group is needed.

    Returns:
        [sum of n, d] on the device of `rows`, the same on every rank.
    """
    if world_size == 1:
        return rows
    device = _collective_device(rows)
    shape = torch.tensor(rows.shape, dtype=torch.int64, device=device)
    shapes = [torch.empty_like(shape) for _ in range(world_size)]
    dist.all_gather(shapes, shape)
    counts, widths = torch.stack(shapes).cpu().unbind(1)
    # All ranks must send the same number of elements: pad to the fullest rank, cut after the gather.
    padded = torch.zeros(int(counts.max()), int(widths.max()), dtype=rows.dtype, device=device)
    if len(rows):
        padded[: len(rows)] = rows.detach().to(device)
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded)
    kept = [block[:count] for block, count in zip(gathered, counts.tolist())]
    return torch.cat(kept).to(rows.device)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in true float32: no autocast, no TF32 or bfloat16 shortcut a training run may have switched on."""
    backends: Any = torch.backends
    switches = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before):
            switch.fp32_precision = value
