"""Numbers remembered for every sample of the data set, looked up by the sample's integer key.

One float32 per sample and modality is 8 GB for a billion samples, and per-sample temperatures are four times that. So every
row is held once over ALL ranks: rank r has rows r·R … (r+1)·R − 1 with R = ⌈rows/K⌉. What the ranks exchange per step are
the values of the global batch's rows, by one all-reduce whose size does not depend on how keys fall on ranks, so that no
rank waits for a count and nothing goes through the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuclip import distributed

PLACES = ("auto", "gpu", "host")

# Tables above this size (bytes, over all ranks) stay out of the state dict, for the trainer to save in parts.
STATE_DICT_LIMIT = 2 * 10**9

# Bytes of a rank's share that are gathered at a time when the whole table is put together.
GATHERED_BYTES = 1 << 26


@dataclass(frozen=True)
class Placement:
    """Where a rank's share of a table lives when the objective is moved to a GPU. Without a GPU it is the host's memory.

    Attributes:
        place: "gpu"; "host", page-locked memory that the GPU reads and writes directly; "auto", the GPU within the budget.
        gpu_bytes: the budget of "auto", per rank.
    """

    place: str = "auto"
    gpu_bytes: int = 4 << 30

    def on_gpu(self, num_bytes: int) -> bool:
        """Whether a share of that size goes to the GPU's own memory."""
        return self.place == "gpu" or (self.place == "auto" and num_bytes <= self.gpu_bytes)


class ShardedTable(nn.Module):
    """A table [rows, columns] of float32 (float64 in tests), each row on one rank.

    Args:
        rows: number of keys, > 0.
        initial: what every row starts with, one number per column.
        placement: where the rank's share goes when the table is moved to a GPU.

    Attributes:
        shard: [R + 1, columns], this rank's rows; the last one is spare: it takes what is written for other ranks' keys.
        in_state_dict: whether the state dict holds the table. It does up to STATE_DICT_LIMIT bytes; larger ones are saved
            and loaded in parts through `local_rows` and `fill`.
    """

    shard: Tensor

    def __init__(self, rows: int, initial: Sequence[float], placement: Placement = Placement()) -> None:
        super().__init__()
        self.rows = rows
        self.placement = placement
        self.rows_per_rank = -(-rows // distributed.world_size())
        self.first_row = distributed.rank() * self.rows_per_rank
        values = torch.tensor(initial, dtype=torch.float32)
        # One row is written over all: the fastest way to fill gigabytes, and it touches every page, so that memory that
        # does not suffice shows here and not after an hour.
        self.register_buffer("shard", values.repeat(self.rows_per_rank + 1, 1), persistent=False)
        self.in_state_dict = rows * values.nbytes <= STATE_DICT_LIMIT

    @property
    def num_local_rows(self) -> int:
        """Rows of the table that this rank holds; fewer than R on the last rank."""
        return max(0, min(self.rows_per_rank, self.rows - self.first_row))

    @torch.no_grad()
    def read(self, keys: Tensor) -> Tensor:
        """Rows by key, on every rank.

        Args:
            keys: [N] int64 in [0, rows), the same on all ranks.

        Returns:
            [N, columns], a copy.
        """
        places, is_local = self._places(keys)
        if not distributed.is_distributed():
            return self.shard[places]
        values = torch.where(is_local[:, None], self.shard[places], 0.0)
        return distributed.all_reduce_sum_(values)

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor) -> None:
        """Replace rows. Of a key that occurs twice one of the values stays.

        Args:
            keys: [N] int64 in [0, rows), the same on all ranks.
            values: [N, columns], the same on all ranks.
        """
        places, _ = self._places(keys)
        self.shard[places] = values.to(self.shard.dtype)

    def check_keys(self, keys: Tensor) -> None:
        """Check keys on the host.

        Raises:
            ValueError: a key is outside the table; the message names it.
        """
        outside = keys[(keys < 0) | (keys >= self.rows)].tolist()
        if outside:
            remedy = "keys count from 0" if outside[0] < 0 else f"give at least {outside[0] + 1}"
            raise ValueError(
                f"a training sample has the key {outside[0]}, outside 0 … {self.rows - 1} of --data_size {self.rows}, "
                f"which counts the integer keys of the data set, gaps included: {remedy}"
            )

    def local_rows(self) -> Tensor:
        """[num_local_rows, columns], rows first_row, first_row + 1, … of the table; shares memory with it."""
        return self.shard[: self.num_local_rows]

    @torch.no_grad()
    def fill(self, first: int, values: Tensor) -> None:
        """Take over those of the rows first, first + 1, … that this rank holds.

        Args:
            values: [any number, columns].
        """
        begin = max(first, self.first_row)
        end = min(first + len(values), self.first_row + self.num_local_rows)
        if begin < end:
            self.shard[begin - self.first_row : end - self.first_row].copy_(values[begin - first : end - first])

    @torch.no_grad()
    def whole(self) -> Tensor:
        """[rows, columns] in the host's memory, on every rank. All ranks call it."""
        columns = self.shard.shape[1]
        result = torch.empty((distributed.world_size(), self.rows_per_rank, columns), dtype=self.shard.dtype)
        step = max(1, GATHERED_BYTES // (columns * self.shard.element_size()))
        for first in range(0, self.rows_per_rank, step):
            part = slice(first, min(first + step, self.rows_per_rank))
            result[:, part] = distributed.all_gather(self.shard[None, part], dim=0).cpu()
        return result.view(-1, columns)[: self.rows]

    def _places(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the shard, the spare one for keys of other ranks; and whether the key is this rank's."""
        places = keys - self.first_row
        is_local = (places >= 0) & (places < self.rows_per_rank)
        return torch.where(is_local, places, self.rows_per_rank), is_local

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedTable:
        # Every .to(), .double() and so on comes through here.
        target = fn(self.shard[:0])
        num_bytes = self.shard.numel() * target.element_size()
        if target.device.type != "cuda" or self.placement.on_gpu(num_bytes):
            return super()._apply(fn, recurse)
        if (target.device, target.dtype) == (self.shard.device, self.shard.dtype):
            return self
        on_host = self.shard.to("cpu", target.dtype)
        self.shard = _mapped_to_gpu(on_host, target.device)
        self._on_host = on_host  # what `shard` is a view of
        weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, on_host.data_ptr())
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {"rows": self.rows, "columns": self.shard.shape[1]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Nothing to take over; `_load_from_state_dict` has compared the sizes."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_state_dict:
            destination[prefix + "table"] = self.whole()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        table = state_dict.pop(prefix + "table", None)
        saved = state_dict.get(prefix + "_extra_state", {"rows": self.rows, "columns": self.shard.shape[1]})
        if saved["rows"] != self.rows or saved["columns"] != self.shard.shape[1]:
            error_msgs.append(
                f"it has a table of {saved['rows']} keys with {saved['columns']} numbers each, --data_size and the other "
                f"flags make one of {self.rows} with {self.shard.shape[1]}: give the --data_size it was trained with"
            )
        elif table is not None:
            self.fill(0, table)
        elif self.in_state_dict:
            missing_keys.append(prefix + "table")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class _CudaArray:
    """Describes memory to torch.as_tensor by the CUDA array interface (version 3)."""

    def __init__(self, tensor: Tensor) -> None:
        kind = {torch.float32: "<f4", torch.float64: "<f8"}[tensor.dtype]
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": kind,
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _mapped_to_gpu(on_host: Tensor, device: torch.device) -> Tensor:
    """A CUDA tensor over host memory, which is page-locked for it: kernels reach single rows over the bus.

    Raises:
        RuntimeError: CUDA cannot lock that much memory.
    """
    with torch.cuda.device(device):
        status = torch.cuda.cudart().cudaHostRegister(on_host.data_ptr(), on_host.nbytes, 0)
        if int(status) != 0:
            raise RuntimeError(
                f"CUDA cannot page-lock {on_host.nbytes / 2**30:.1f} GiB of host memory ({status}): where that is for want of "
                "memory raise the limit of locked memory (ulimit -l), or use --table-device gpu"
            )
        return torch.as_tensor(_CudaArray(on_host), device=device)
