"""Checkpoints: tensors and plain Python values only, so that torch.load(weights_only=True) and plain open_clip read them.

Tables with numbers for every sample of a large data set stand beside the file (table_files.py).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from neuclip.objectives import Objective
from training.errors import UNREADABLE, UserError, reason_of
from training.model import TwoTowers
from training.optim import load_optimizer_state
from training.table_files import large_tables, load_tables, remove_unused

LATEST = "epoch_latest.pt"


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

    def to_checkpoint(self, name: str, model_name: str, tables: str | None = None) -> dict[str, Any]:
        """The content of a checkpoint file. Every rank calls it, since the objective's state may be spread over them.

        Args:
            tables: name of the folder with the objective's large tables (`save_tables`).

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
        if self.towers.extra_logit_bias is not None:
            content["logit_bias"] = self.towers.extra_logit_bias.detach()
        return content

    def load(self, checkpoint: dict[str, Any], path: Path, model_name: str) -> None:
        """Restore everything.

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

    def follow_schedule(self, steps_per_epoch: int) -> None:
        """Count steps in those of the present run, where world size, batch or data have changed since the checkpoint.

        Schedules follow steps; with the old count they would be ahead or behind by as much as an epoch's length changed.
        """
        expected = self.epoch * steps_per_epoch
        if self.step != expected:
            logging.warning(
                "an epoch had another number of steps when the checkpoint was written: going on at step %d, not %d",
                expected,
                self.step,
            )
            self.step = self.objective.step = expected


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the host's memory. Never runs code from the file.

    Raises:
        UserError: the file is absent or not a whole checkpoint.
    """
    if not path.is_file():
        raise UserError(f"--resume {path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"--resume {path} cannot be read as a checkpoint: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"--resume {path} holds a {type(content).__name__}, not a checkpoint")
    return content


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while saving left behind."""
    for path in folder.glob(".*.pt.*.tmp"):
        path.unlink(missing_ok=True)
    remove_unused(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Files that cannot be read are named in the log and passed over."""
    files = [path for path in folder.glob("*.pt") if re.fullmatch(r"(epoch|iter)_(\d+|latest)\.pt", path.name)]
    for path in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            read_checkpoint(path)
        except UserError as error:
            logging.warning("passed over: %s", error)
        else:
            return path
    return None


def _check_architecture(model: nn.Module, checkpoint: dict[str, Any], path: Path, model_name: str) -> None:
    saved, present = checkpoint["state_dict"], model.state_dict()
    for key in [*present, *saved]:
        shapes = [tuple(part[key].shape) if key in part else "absent" for part in (saved, present)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"--resume {path} is of another architecture ({checkpoint.get('model', 'unknown')}) than --model "
                f"{model_name}: {key} is {shapes[0]} there and {shapes[1]} here; give the --model it was trained with"
            )
