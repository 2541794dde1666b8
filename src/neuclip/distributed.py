"""The few collectives that the objectives need. On one rank, or without a process group, each is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of ranks K; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def all_gather(tensor: Tensor, dim: int) -> Tensor:
    """Concatenate the tensors of all ranks along `dim`, in rank order, without gradient.

    Args:
        tensor: any shape and dtype, the same on every rank.
        dim: the dimension that grows from B to N = K·B.
    """
    if not is_distributed():
        return tensor.detach()
    local = tensor.detach().movedim(dim, 0).contiguous()
    gathered = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local)
    return gathered.movedim(0, dim)


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum `tensor` (contiguous) over the ranks in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_gather_features(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Gather both feature blocks of the global batch in one message, without gradient.

    Args:
        image_features, text_features: [B, d], the same B on every rank.

    Returns:
        Two tensors [N, d] in rank order: rank r's samples are rows r·B … (r+1)·B − 1.
    """
    packed = all_gather(torch.stack((image_features, text_features)), dim=1)
    return packed[0], packed[1]


def all_reduce_log_sum_exp(log_values: Tensor) -> Tensor:
    """log Σ_r exp(x_r) of the tensors x_r of all ranks, by one message and exact over a range that float32 has not.

    The sum is formed in float64, so nothing has to be taken off the values first, which would need a message of its own to
    agree on. On one rank the values themselves.

    Args:
        log_values: any shape and floating dtype, the same on every rank; between −700 and 700, or −inf.
    """
    if not is_distributed():
        return log_values
    return all_reduce_sum_(log_values.double().exp()).log_().to(log_values.dtype)


def all_agree(agrees: bool, device: torch.device) -> bool:
    """Whether all ranks agree. Waits for the device: not for every step."""
    if not is_distributed():
        return agrees
    votes = torch.tensor([0.0 if agrees else 1.0], device=device)
    return all_reduce_sum_(votes).item() == 0.0
