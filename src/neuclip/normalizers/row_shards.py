"""Rows of a tensor dealt out over the ranks, and put together again for checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from neuclip import distributed


@dataclass(frozen=True)
class RowShards:
    """Rows 0 … rows − 1 of the second dimension of a stack [2, rows, ...], dealt out in turn: rank r has r, r + K, r + 2K, …

    So a beginning of the rows is spread over all ranks as evenly as all of them.

    Attributes:
        rows: number of rows over all ranks, ≥ 0.
        rank, ranks: r and K.
    """

    rows: int
    rank: int
    ranks: int

    @classmethod
    def over_ranks(cls, rows: int) -> RowShards:
        """Over the ranks of the process group."""
        return cls(rows, distributed.rank(), distributed.world_size())

    @classmethod
    def undivided(cls, rows: int) -> RowShards:
        """All rows here."""
        return cls(rows, 0, 1)

    @property
    def held(self) -> int:
        """How many rows this rank has."""
        return self.count(self.rows)

    def count(self, first: int) -> int:
        """How many of the first so many rows are this rank's."""
        return len(range(self.rank, first, self.ranks))

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a stack [2, any number, ...], as a view."""
        return whole[:, self.rank :: self.ranks]

    @torch.no_grad()
    def whole(self, own: Tensor) -> Tensor:
        """The stack [2, rows, ...] from every rank's [2, held, ...]. All ranks call it, all get it."""
        if self.ranks == 1:
            return own
        slots = -(-self.rows // self.ranks)
        padded = own.new_zeros((own.shape[0], slots, *own.shape[2:]))
        padded[:, : self.held] = own
        by_rank = distributed.all_gather(padded[:, None], dim=1)
        return by_rank.transpose(1, 2).flatten(1, 2)[:, : self.rows]


def save_whole(module: nn.Module, shards: dict[str, RowShards], remedies: dict[str, str]) -> None:
    """Let a module's state dict hold whole stacks of which each rank has its rows: it fits any number of ranks.

    Args:
        module: whose buffers, or whose children's buffers, they are.
        shards: by name as in the module's state dict.
        remedies: what to do when a checkpoint has another number of rows, by name; without one the rows are set to 0.

    A stack of no rows is saved as it is, without a message.
    """

    def gather(_: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name, rows in shards.items():
            if rows.rows:
                state_dict[prefix + name] = rows.whole(state_dict[prefix + name])

    def cut(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        error_messages: list[str] = rest[-1]
        for name, rows in shards.items():
            saved = state_dict.get(prefix + name)
            if saved is None or saved.dim() < 2:
                continue  # missing, or of another kind: load_state_dict says so
            if saved.shape[1] == rows.rows:
                state_dict[prefix + name] = rows.own(saved)
            elif name in remedies:
                error_messages.append(f"it has {saved.shape[1]} {name}, not {rows.rows}: {remedies[name]}")
                state_dict[prefix + name] = attrgetter(name)(owner).detach()  # as it is
            else:
                state_dict[prefix + name] = saved.new_zeros((saved.shape[0], rows.held, *saved.shape[2:]))

    module.register_state_dict_post_hook(gather)
    module.register_load_state_dict_pre_hook(cut)
