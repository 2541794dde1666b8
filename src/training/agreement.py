"""What all ranks must decide alike, decided without waiting: small numbers, added up over the ranks while they compute.

A decision that depends on one rank's clock, signals or data must be taken by all ranks at the same step. Every step hands
in its numbers and gets the sums of the step before, whose message has had a whole step's time to travel between the hosts.
No GPU takes part, so none is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from training.distributed import World


class Agreement:
    """Sums of integers over all ranks, one step late.

    Args:
        names: of the numbers, in the same order on every rank.
    """

    def __init__(self, world: World, names: Sequence[str]) -> None:
        self._world = world
        self._names = tuple(names)
        self._sums = torch.zeros(len(names), dtype=torch.int64)
        self._travelling: dist.Work | None = None

    def exchange(self, mine: Mapping[str, int]) -> dict[str, int]:
        """Hand in this rank's numbers; returns the sums of what was handed in by the last call (zeros at first).

        All ranks call it equally often. A single rank gets back its present numbers.
        """
        if self._world.size == 1:
            return {name: mine[name] for name in self._names}
        before = self._arrived()
        self._sums = torch.tensor([mine[name] for name in self._names], dtype=torch.int64)
        self._travelling = dist.all_reduce(self._sums, group=self._world.control, async_op=True)
        return before

    def settle(self, mine: Mapping[str, int]) -> dict[str, int]:
        """The sums of the present numbers; waits for all ranks."""
        if self._world.size > 1:
            self.exchange(mine)
            return self._arrived()
        return {name: mine[name] for name in self._names}

    def _arrived(self) -> dict[str, int]:
        if self._travelling is not None:
            self._travelling.wait()
            self._travelling = None
        return dict(zip(self._names, self._sums.tolist()))
