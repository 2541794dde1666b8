"""How gradients are averaged over the ranks."""

from __future__ import annotations

from torch import nn
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
