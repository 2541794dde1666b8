"""Who this process is among the ranks, by torchrun's variables, by srun's, or alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from evaluation.ranks import environment
from neuclip.normalizers import release_recordings
from training.errors import OtherRankError, UserError

T = TypeVar("T")


class Channel:
    """Holds a process group until `release`.

    Whoever keeps a World would otherwise keep the group. A group that is freed when the interpreter ends aborts the process:
    its destructor gives up the interpreter's lock, and a thread that wants it back then is ended.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group: dist.ProcessGroup | None = group
        _channels.append(self)

    def release(self) -> None:
        """Forget the group."""
        self.group = None


_channels: list[Channel] = []


@dataclass(frozen=True)
class World:
    """This process's place.

    Attributes:
        rank, size: this process's number among all processes; their number.
        device: where this rank computes.
        channel: a group of all ranks for messages between hosts (gloo). It never touches a GPU, and it is patient: ranks may
            wait in it for one that evaluates or writes. None: the default group is used.
    """

    rank: int
    size: int
    device: torch.device
    channel: Channel | None = None

    @property
    def control(self) -> dist.ProcessGroup | None:
        """The channel's group."""
        return None if self.channel is None else self.channel.group

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and speaks to the user."""
        return self.rank == 0

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank (a plain Python object)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank (plain Python objects)."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def check_together(self, check: Callable[[], T]) -> T:
        """Run a check on every rank; if it fails on any, it fails on all, so that none is left waiting for the others.

        Raises:
            UserError: the first failing rank's message.
            Exception: on the rank where it happened, whatever else `check` raised; OtherRankError on the others.
        """
        result, message, unexpected = None, None, None
        try:
            result = check()
        except UserError as error:
            message = str(error)
        except Exception as error:
            # A bug or a full memory, say: the others must be told all the same.
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            unexpected = error
        told = self.gather((message, unexpected is not None))
        if unexpected is not None:
            raise unexpected
        messages = [text for text, _ in told]
        strange = [(rank, text) for rank, (text, is_strange) in enumerate(told) if is_strange]
        if strange:
            raise OtherRankError(f"{strange[0][1]} (on rank {strange[0][0]})")
        failed = [m for m in messages if m is not None]
        if failed:
            where = "" if len(failed) == self.size else f" (on rank {messages.index(failed[0])})"
            raise UserError(failed[0] + where)
        return result  # type: ignore[return-value]

    def check_same(self, value: object, what: str) -> None:
        """Check that a value is the same on every rank.

        Raises:
            UserError: it is not; `what` begins the message.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"{what}: rank 0 has {values[0]}, rank {rank} has {other}; all must see the same files")


def connect(device: str, backend: str | None, url: str, timeout_seconds: int, patience_seconds: int = 0) -> World:
    """Choose this rank's device and join the process group (if there is more than one rank).

    Args:
        device: "auto", "cuda" or "cpu".
        backend: None for nccl on GPUs and gloo on CPUs.
        timeout_seconds: after which a collective of the training step fails.
        patience_seconds: the same for messages between hosts (`World.control`), if that is longer.

    Raises:
        UserError: CUDA is asked for and absent, or ranks cannot find each other.
    """
    rank, local_rank, size = environment()
    chosen = _device(device, local_rank)
    channel = None
    if size > 1:
        if url == "env://" and "MASTER_ADDR" not in os.environ:
            raise UserError(
                f"MASTER_ADDR is not set and there are {size} ranks: in the sbatch script, "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        # A port of the job's own: two jobs on one node with a fixed port would join each other's group and hang.
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
        try:
            dist.init_process_group(
                backend=backend or ("nccl" if chosen.type == "cuda" else "gloo"),
                init_method=url,
                world_size=size,
                rank=rank,
                timeout=timedelta(seconds=timeout_seconds),
                device_id=chosen if chosen.type == "cuda" else None,
            )
        except (dist.DistError, ValueError) as error:
            place = url if url != "env://" else f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = " ".join(str(error).split())
            raise UserError(
                f"{size} ranks cannot meet at {place} ({reason[:200]}): check MASTER_ADDR and MASTER_PORT, "
                "that the port is free and that all ranks were started"
            ) from error
        channel = _open_channel(max(timeout_seconds, patience_seconds))
    return World(rank, size, chosen, channel)


def _open_channel(timeout_seconds: int) -> Channel:
    try:
        return Channel(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the hosts cannot talk to each other through gloo ({reason[:200]}): set GLOO_SOCKET_IFNAME to the network "
            "interface that connects the nodes, such as eth0 or ib0"
        ) from error


def release_channels() -> None:
    """Forget the groups of all channels, at the latest before the interpreter ends."""
    while _channels:
        _channels.pop().release()


def disconnect() -> None:
    """Leave the process group. Recorded CUDA graphs are forgotten: NCCL would wait for the last one that talks to it."""
    release_recordings()
    release_channels()
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine shows no CUDA device; use --device cpu or auto")
        # slurm may show each task a single GPU, which is then number 0 whatever the local rank.
        count = torch.cuda.device_count()
        if count > 1 and local_rank >= count:
            raise UserError(f"local rank {local_rank} on a node that shows {count} GPUs: start one process per GPU")
        index = local_rank if count > 1 else 0
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name)
