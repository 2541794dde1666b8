"""Evaluation on several processes: who this one is, the device it uses, and mistakes that all of them learn of.

Started by torchrun or srun like training; alone otherwise. Nothing here is needed by who calls evaluation from a running
training, which has its own process group.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from evaluation.errors import UserError, one_line

T = TypeVar("T")


class SharedError(UserError):
    """A user's mistake that every rank has been told of: rank 0 speaks for all."""


# One rank may read a large set while the others wait for its features.
PATIENCE = timedelta(hours=4)
# Starting up takes no longer: a rank that is not there by then will not come.
MEETING = timedelta(minutes=5)


def environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) from the environment.

    torchrun's variables come first, since torchrun itself may run under srun. The shell of a batch job has SLURM_PROCID and
    SLURM_NTASKS too, without being a task of a step: a program started there without srun is alone.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    in_step = "SLURM_JOB_ID" not in env or "SLURM_STEP_NUM_TASKS" in env or "SLURM_STEP_NUM_NODES" in env
    if "SLURM_PROCID" in env and in_step:
        # The tasks of this step, where slurm says it: SLURM_NTASKS is that of the job in an interactive shell.
        tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1))
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), int(tasks)
    return 0, 0, 1


_TOLD = "All ranks have been told."


def known_to_all(error: Exception) -> bool:
    """Whether every rank has learnt of this error from `Place.together`, so that all can go on with something else."""
    return isinstance(error, SharedError) or _TOLD in getattr(error, "__notes__", ())


def alone(work: Callable[[], T]) -> T:
    """What `Place.together` does on one rank.

    Raises:
        UserError: in one line, also if it comes from a loader process.
    """
    try:
        return work()
    except UserError as error:
        raise type(error)(one_line(error)) from None


@dataclass(frozen=True)
class Place:
    """This process among the ranks.

    Attributes:
        rank, world_size: its number, and how many there are.
        device: where it computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and speaks to the user."""
        return self.rank == 0

    def say(self, text: str = "") -> None:
        """Print a line, on rank 0 alone."""
        if self.is_main:
            print(text, flush=True)

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank; if an error ends it on any, it ends on all, so that none waits for the others.

        Collectives inside `work` are not protected: it must not fail on one rank between two of them.

        Raises:
            SharedError: with the message of the first rank that failed; on one rank, the UserError, in one line.
            Exception: on a rank of its own, an error that is no user's mistake; `known_to_all` tells it from others.
        """
        if self.world_size == 1:
            return alone(work)
        result, message = None, None
        failure: Exception | None = None
        try:
            result = work()
        except UserError as error:
            message = one_line(error)
        except Exception as error:
            failure, message = error, f"rank {self.rank} failed: {type(error).__name__}: {one_line(error)}"
        failed = [text for text in self.everyone(message) if text is not None]
        if failure is not None:
            failure.add_note(_TOLD)
            raise failure
        if failed:
            raise SharedError(failed[0])
        return result  # type: ignore[return-value]

    def everyone(self, value: T) -> list[T]:
        """The values of all ranks, in their order; all ranks call this together."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone, and tell all ranks the result; a user's mistake ends it on all.

        Raises:
            SharedError: with rank 0's message.
        """
        result = self.together(lambda: work() if self.is_main else None)
        return self.everyone(result)[0]  # type: ignore[return-value]


@contextmanager
def joined(device: str = "auto") -> Iterator[Place]:
    """Join the other ranks, if there are any, for the time of the context.

    Args:
        device: `auto` (a GPU if there is one: on several ranks the one with this rank's local number), `cpu`, `cuda`,
            `cuda:1` …

    With several ranks, whatever goes wrong on this one alone ends its process at once: the launcher (torchrun,
    `srun --kill-on-bad-exit`) then ends the others, which would wait in a collective for hours.

    Raises:
        UserError: for a device that torch does not know or this machine lacks, or ranks that cannot find each other.
        SharedError: passed on from the context.
    """
    rank, local_rank, world_size = environment()
    chosen = _device(device, local_rank, world_size)
    if world_size == 1:
        yield Place(rank, world_size, chosen)
        return
    _join(rank, world_size, chosen)
    try:
        yield Place(rank, world_size, chosen)
    except SharedError:
        dist.destroy_process_group()
        raise
    except BaseException as error:
        # Not sys.exit: leaving in good order would wait for the others, which may wait for this rank.
        _end_now(error)
    dist.destroy_process_group()


def _end_now(error: BaseException) -> NoReturn:
    mistake = isinstance(error, UserError)
    if mistake:
        print(f"error: {one_line(error)}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if mistake else 1)


def _join(rank: int, world_size: int, device: torch.device) -> None:
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"MASTER_ADDR is not set and there are {world_size} ranks: start them with torchrun, or export it"
        )
    # A port of the job's own: two jobs on one node with a fixed port would join each other's group and hang.
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
    # Each kind of tensor has its own backend: the gathers of features stay on the GPUs, Python objects on the hosts.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=MEETING))
        store.set_timeout(PATIENCE)  # the first collective goes through it too
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    except (dist.DistError, ValueError) as error:
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{world_size} ranks cannot meet at {meeting} ({reason}): check MASTER_ADDR, MASTER_PORT"
        ) from None


def _device(name: str, local_rank: int, world_size: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size > 1 and torch.cuda.device_count() > 1:
        # slurm may show each task a single GPU, which is then number 0 whatever the local rank.
        name = f"cuda:{local_rank}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu.") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
