"""torch.compile of the towers, for --torchcompile."""

from __future__ import annotations

from torch import nn


def compile_towers(towers: nn.Module, has_two_passes: bool) -> None:
    """Compile the forward pass in place, at its first call: parameters keep their names, so checkpoints stay as they are.

    Evaluation calls the model inside, which is not compiled. Within DistributedDataParallel the graph is cut where its
    gradient buckets are, so that they still travel during backward.

    Args:
        has_two_passes: the towers see each micro-batch twice, without a graph and with one (accumulation.py). Those are two
            compiled programs, and both must draw the same random numbers: they draw those of PyTorch's own generator, in
            the order of the uncompiled towers.
    """
    towers.compile(options={"fallback_random": True} if has_two_passes else None)
