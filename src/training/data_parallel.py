"""How gradients are averaged over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from training.distributed import World

COMPRESSIONS = ("none", "bf16")


def distribute(towers: nn.Module, world: World, static_graph: bool, compression: str) -> nn.Module:
    """The towers with gradients averaged over the ranks; on one rank the towers themselves. All ranks call it.

    Args:
        static_graph: every step uses the same parameters in the same order. False is always right.
        compression: "bf16" sends gradients in half the bytes. Each rank divides its own by the number of ranks and rounds
            it to bfloat16, 8 bits of precision; the sum of K ranks is formed in bfloat16 too, so its relative error is up to
            about K · 2⁻⁹ and grows with K. What the optimizer gets is float32 again.
    """
    if world.size == 1:
        return towers
    device_ids = [world.device] if world.device.type == "cuda" else None
    model = DistributedDataParallel(
        towers, device_ids=device_ids, gradient_as_bucket_view=True, static_graph=static_graph
    )
    if compression == "bf16":
        model.register_comm_hook(None, bf16_compress_hook)
    return model


def settle_buckets(model: nn.Module, forward: Callable[[], Sequence[Tensor | None]]) -> None:
    """One pass through DistributedDataParallel whose gradients are all 0; nothing for any other model.

    Gradients travel in buckets, and after its first backward pass DistributedDataParallel fills them anew, in the order in
    which gradients came. From three ranks on the place in a bucket decides in which order the ranks' parts are added up, and
    with it how the sum is rounded. So the first step of a process differs from what a process that went on would have
    computed, unless the buckets have been filled anew before it.

    Args:
        forward: calls the model; what it returns is differentiated.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    outputs = [x for x in forward() if x is not None and x.requires_grad]
    torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])
    model.zero_grad(set_to_none=True)
