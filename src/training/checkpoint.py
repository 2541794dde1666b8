"""Checkpoints: tensors and plain Python values only, so that torch.load(weights_only=True) and plain open_clip read them.

Tables with numbers for every sample of a large data set stand beside the file (table_files.py).
"""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from evaluation.sample_tables import large_tables, load_tables
from neuclip.objectives import Objective
from training.atomic_files import read_sidecar, sidecar_of, verify
from training.errors import UNREADABLE, UserError, reason_of
from training.model import TwoTowers
from training.optim import load_optimizer_state
from training.table_files import describe_tables, missing_parts, remove_unused

LATEST = "epoch_latest.pt"
NAME = re.compile(r"(?P<kind>epoch|iter)_(?P<number>\d+|latest)\.pt")


@dataclass
class Continuation:
    """What a run needs, beyond what it has learnt, to go on as if it had never stopped.

    All of it is tensors and plain values in dicts and lists.

    Attributes:
        step_in_epoch: optimizer steps taken in the epoch that is under way; 0 between two epochs.
        steps_per_epoch: steps that an epoch had when this was saved.
        rng: every rank's `random_state.rng_state`, in the order of ranks.
        data: the state of the loader. data_report: what it has counted so far.
    """

    step_in_epoch: int
    steps_per_epoch: int
    rng: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    data_report: dict[str, Any] = field(default_factory=dict)

    def to_checkpoint(self) -> dict[str, Any]:
        """Its part of a checkpoint's content."""
        position = {"step_in_epoch": self.step_in_epoch, "steps_per_epoch": self.steps_per_epoch}
        return {"position": position, "rng": self.rng, "data": self.data, "data_report": self.data_report}

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Continuation | None:
        """The one in a checkpoint's content; None in those of versions that saved between epochs only.

        Raises:
            ValueError: the position is not two whole numbers, the first of them not below 0 nor above the second.
        """
        if "position" not in content:
            return None
        position = content["position"] if isinstance(content["position"], dict) else {}
        done, steps = position.get("step_in_epoch"), position.get("steps_per_epoch")
        if not (isinstance(done, int) and isinstance(steps, int) and 0 <= done <= steps):
            raise ValueError(f"its position is {content['position']}")
        return cls(done, steps, content.get("rng", []), content.get("data", {}), content.get("data_report", {}))


@dataclass
class TrainingState:
    """Everything a run learns or remembers.

    Attributes:
        towers, objective, optimizer, scaler: the parts with a state dict of their own.
        epoch: epochs completed. step: optimizer steps taken.
    """

    towers: TwoTowers
    objective: Objective
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0

    def to_checkpoint(
        self, name: str, model_name: str, tables: str | None = None, continuation: Continuation | None = None
    ) -> dict[str, Any]:
        """The content of a checkpoint file. Every rank calls it, since the objective's state may be spread over them.

        Args:
            tables: name of the folder with the objective's large tables (`save_tables`).
            continuation: where the epoch under way stands; needed within an epoch.

        `state_dict` is that of the architecture alone and opens in plain open_clip; a logit_bias that the architecture does
        not have stands beside it.
        """
        content = {
            "epoch": self.epoch,
            "step": self.step,
            "name": name,
            "model": model_name,
            # Whatever order in memory the towers compute in, files have the usual one.
            "state_dict": {key: _contiguous(value) for key, value in self.towers.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "objective": {"name": self.objective.name, "state_dict": self.objective.state_dict()},
        }
        if tables is not None:
            content["tables"] = tables
            content["table_rows"] = describe_tables(self.objective)
        if continuation is not None:
            content.update(continuation.to_checkpoint())
        if self.towers.extra_logit_bias is not None:
            content["logit_bias"] = self.towers.extra_logit_bias.detach()
        return content

    def load(self, checkpoint: dict[str, Any], path: Path, model_name: str) -> Continuation | None:
        """Restore everything learnt. `epoch` is then the number of epochs completed.

        Returns:
            What the caller restores, generators and loader; None from a file of a version that saved between epochs only.

        Raises:
            UserError: the file is of another architecture, objective or optimizer.
        """
        saved = checkpoint.get("objective")
        parts_are_dicts = all(isinstance(checkpoint.get(part, {}), dict) for part in ("objective", "state_dict"))
        if not parts_are_dicts or (saved is not None and "name" not in saved):
            raise UserError(f"--resume {path} is no checkpoint of this trainer; --pretrained takes foreign weights")
        if saved is not None and saved["name"] != self.objective.name:
            raise UserError(
                f"--resume {path} was trained with --objective {saved['name']}, not {self.objective.name}: "
                f"give that one, or start anew from its weights with --pretrained {path}"
            )
        needed = {"epoch", "step", "state_dict", "optimizer", "scaler", "objective"}
        if self.towers.extra_logit_bias is not None:
            needed.add("logit_bias")
        missing = needed - checkpoint.keys()
        if missing:
            raise UserError(
                f"--resume {path} lacks {', '.join(sorted(missing))}: it is no checkpoint of this trainer; "
                f"to start from its weights only, use --pretrained {path}"
            )
        _check_architecture(self.towers.model, checkpoint, path, model_name)
        continuation = _continuation_of(checkpoint, path)
        self.towers.model.load_state_dict(checkpoint["state_dict"])
        if self.towers.extra_logit_bias is not None:
            self.towers.extra_logit_bias.data.copy_(checkpoint["logit_bias"])
        try:
            self.objective.load_state_dict(checkpoint["objective"]["state_dict"])
            load_optimizer_state(self.optimizer, checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--resume {path} does not fit the present flags: {reason}") from None
        if large_tables(self.objective):
            load_tables(self.objective, path.parent / checkpoint.get("tables", "tables"))
        if checkpoint["scaler"]:  # empty where --precision needed none
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"]
        self.step = checkpoint["step"]
        return continuation

    def follow_schedule(self, steps_per_epoch: int, first_step: int = 0) -> None:
        """Count steps in those of the present run, where world size, batch or data have changed since the checkpoint.

        Schedules follow steps; with the old count they would be ahead or behind by as much as an epoch's length changed.

        Args:
            steps_per_epoch: of the present run.
            first_step: the step, in those of the present run, at which it goes on within the epoch.
        """
        expected = self.epoch * steps_per_epoch + first_step
        if self.step != expected:
            logging.warning(
                "an epoch had another number of steps when the checkpoint was written: going on at step %d, not %d",
                expected,
                self.step,
            )
            self.step = self.objective.step = expected


def _continuation_of(checkpoint: dict[str, Any], path: Path) -> Continuation | None:
    try:
        return Continuation.of_checkpoint(checkpoint)
    except ValueError as error:
        raise UserError(f"--resume {path} is no checkpoint of this trainer: {error}") from None


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the host's memory. Never runs code from the file.

    Raises:
        UserError: the file is absent or not a whole checkpoint.
    """
    if not path.is_file():
        # Rank 0 has found it, or has fetched it from --remote-sync.
        raise UserError(
            f"--resume {path}: there is no such file on this node; --logs must be a folder that all nodes see"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"--resume {path} cannot be read as a checkpoint: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"--resume {path} holds a {type(content).__name__}, not a checkpoint")
    return content


def check_whole(path: Path) -> None:
    """Read a checkpoint, and where its per-sample tables lie, to see that nothing has happened to it since it was written.

    Raises:
        UserError: something has; what it is, and what to do.
    """
    wrong = _what_is_wrong(path)
    if wrong is not None:
        raise UserError(f"--resume {path} is not whole: {wrong}; choose another checkpoint, or --resume latest")


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while saving left: temporary files, sidecars and tables without a checkpoint."""
    for path in folder.glob(".*.pt.*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob("*.pt.json"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)
    remove_unused(folder)


def checkpoint_files(folder: Path) -> list[Path]:
    """A run's checkpoints, the one that was written last first.

    By the time of writing, not by number: after going back to an older epoch on purpose, the files written since are the
    run's, and those with higher numbers are of the part that was given up. Of files written at once (one file with two
    names), the numbered one is first.
    """
    found = []
    for path in folder.glob("*.pt"):
        match = NAME.fullmatch(path.name)
        if match is not None:
            number = -1 if match["number"] == "latest" else int(match["number"])
            with contextlib.suppress(FileNotFoundError):  # removed by the thread that saves, since the folder was read
                found.append((path.stat().st_mtime_ns, number, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None where it has no checkpoints at all.

    Others that are newer are named in the log, with what is wrong with them.

    Raises:
        UserError: there are checkpoints, and none is whole. To start anew would write over them.
    """
    newest, wrong = newest_whole(folder)
    if newest is None and wrong is not None:
        raise UserError(
            f"--resume latest: no checkpoint in {folder} is whole, not even the newest, {wrong}; "
            "put back what is missing, or remove them to start anew"
        )
    return newest


def newest_whole(folder: Path) -> tuple[Path | None, str | None]:
    """(the newest whole checkpoint if there is one, what is wrong with the first that was passed over, if one was)."""
    first_wrong = None
    for path in checkpoint_files(folder):
        wrong = _what_is_wrong(path)
        if wrong is None:
            return path, first_wrong
        logging.warning("passed over %s: %s", path, wrong)
        first_wrong = first_wrong or f"{path.name}: {wrong}"
    return None, first_wrong


def _what_is_wrong(path: Path) -> str | None:
    wrong = verify(path)
    if wrong is not None and read_sidecar(path) is not None:
        return f"{wrong} (by {sidecar_of(path).name}; remove that if the file was put there by hand)"
    if wrong is not None:
        return wrong
    try:
        # Mapped: what it holds and where.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        return f"it cannot be read ({reason_of(error)})"
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not a checkpoint"
    if "tables" not in content:
        return None
    return missing_parts(path.parent / content["tables"], content.get("table_rows"))


def _check_architecture(model: nn.Module, checkpoint: dict[str, Any], path: Path, model_name: str) -> None:
    saved, present = checkpoint["state_dict"], model.state_dict()
    for key in [*present, *saved]:
        shapes = [tuple(part[key].shape) if key in part else "absent" for part in (saved, present)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"--resume {path} is of another architecture ({checkpoint.get('model', 'unknown')}) than --model "
                f"{model_name}: {key} is {shapes[0]} there and {shapes[1]} here; give the --model it was trained with"
            )
