"""Where numbers go: the log, metrics.jsonl, results.jsonl, tensorboard and wandb, and a progress bar in a terminal."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training.distributed import World
from training.errors import UserError
from training.run_folder import RunFolder


class _BarAwareHandler(logging.StreamHandler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def start_logging(world: World, debug: bool) -> None:
    """Log to the console: everything from rank 0, warnings from the others."""
    handler = _BarAwareHandler(sys.stdout)
    who = "" if world.is_main else f"[rank {world.rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname).1s %(message)s", "%H:%M:%S"))
    level = (logging.DEBUG if debug else logging.INFO) if world.is_main else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("PIL", "matplotlib", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _LogFile(logging.FileHandler):
    """A file that can be full: said once on stderr, since logging would print a traceback for every line."""

    is_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.is_told:
            self.is_told = True
            print(f"{self.baseFilename} cannot be written ({error.strerror}); the log goes on here", file=sys.stderr)


def log_to_file(path: Path) -> None:
    """Append the log to a file as well. One that cannot be written to does not end the run."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    logging.getLogger().addHandler(handler)


def reduce_metrics(metrics: dict[str, Tensor], world: World) -> dict[str, float]:
    """Average 0-dim tensors over the ranks (names in `_max`: their maximum). The one place where the host waits."""
    names = sorted(metrics)
    means = torch.stack([metrics[name].detach().double() for name in names])
    if world.size > 1:
        maxima = means.clone()
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        dist.all_reduce(means, op=dist.ReduceOp.SUM)
        is_max = torch.tensor([name.endswith("_max") for name in names], device=means.device)
        means = torch.where(is_max, maxima, means / world.size)
    return dict(zip(names, means.tolist()))


class Reporter:
    """Rank 0's outlets; on other ranks it does nothing. One that cannot be written to costs its numbers, not the run.

    Args:
        args: the resolved command line (--report-to, --wandb-*).
        folder: the run's folder, which exists.
        world: this rank's place.

    Raises:
        UserError: tensorboard or wandb is asked for and not installed.
    """

    def __init__(self, args: Namespace, folder: RunFolder, world: World) -> None:
        self.folder = folder
        self.active = world.is_main
        # Lines that could not be written, by file, since the last one that could.
        self._lost: Counter[Path] = Counter()
        self.tensorboard: Any = None
        self.wandb: Any = None
        outlets = [o for o in args.report_to.split(",") if o] if self.active else []
        if "tensorboard" in outlets:
            self.tensorboard = _open_tensorboard(folder)
        if "wandb" in outlets:
            self.wandb = _open_wandb(args, folder)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a logging interval; `step` counts optimizer steps."""
        if self.active:
            self._line(self.folder.metrics, {"step": step, **values})
            self._publish("train/", step, values)

    def evaluation(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Numbers of an evaluation after `epoch` epochs."""
        if self.active:
            self._line(self.folder.results, {"epoch": epoch, "step": step, **values})
            self._publish("val/", step, {**values, "epoch": epoch})

    @property
    def shows_pictures(self) -> bool:
        """Whether this rank has an outlet for pictures."""
        return self.tensorboard is not None or self.wandb is not None

    def pictures(self, step: int, pictures: dict[str, Path]) -> None:
        """Show pictures, by name; files."""
        if self.tensorboard is not None:
            try:
                for name, path in pictures.items():
                    with Image.open(path) as image:
                        pixels = np.asarray(image.convert("RGB"))
                    self.tensorboard.add_image(f"val/{name}", pixels, step, dataformats="HWC")
            except OSError as error:
                self._give_up_tensorboard(error)
        if self.wandb is not None and pictures:
            import wandb

            self.wandb.log({**{f"val/{name}": wandb.Image(str(path)) for name, path in pictures.items()}, "step": step})

    def close(self) -> None:
        """Flush everything."""
        if self.tensorboard is not None:
            try:
                self.tensorboard.close()
            except OSError as error:
                logging.error("tensorboard's last numbers cannot be written: %s", error.strerror)
        if self.wandb is not None:
            self.wandb.finish()

    def _line(self, path: Path, values: dict[str, float]) -> None:
        # JSON has no NaN and no infinity: null says that there is no number.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            _append(path, (json.dumps(clean) + "\n").encode())
        except OSError as error:
            self._lost[path] += 1
            if self._lost[path] == 1:
                logging.error("%s cannot be written: %s; training goes on", path, error.strerror)
            return
        lost = self._lost.pop(path, 0)
        if lost:
            logging.warning("%s is written again; %d lines are missing", path, lost)

    def _publish(self, prefix: str, step: int, values: dict[str, float]) -> None:
        named = {prefix + name: value for name, value in values.items()}
        if self.tensorboard is not None:
            try:
                for name, value in named.items():
                    self.tensorboard.add_scalar(name, value, step)
            except OSError as error:
                self._give_up_tensorboard(error)
        if self.wandb is not None:
            self.wandb.log({**named, "step": step})

    def _give_up_tensorboard(self, error: OSError) -> None:
        # Its thread has ended, for good.
        logging.error("tensorboard cannot write: %s; from here on it gets nothing", error.strerror)
        self.tensorboard = None


def _append(path: Path, line: bytes) -> None:
    """Append a line to a file as a whole, or nothing of it.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        # A disk may have room for the first part, and the next line would follow on that.
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def progress_bar(world: World, total: int, description: str, done: int = 0) -> tqdm:
    """A bar on rank 0's terminal; nothing when the output goes to a file."""
    disable = None if world.is_main else True
    # tqdm would start a thread of its own here. A process that is forked (a loader's worker) in the moment a thread starts can
    # hang for good inside CPython 3.11, on a lock of the interpreter that the thread held.
    tqdm.monitor_interval = 0
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="step",
        disable=disable,
        leave=False,
        dynamic_ncols=True,
        file=sys.stdout,
    )


def _open_tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--report-to tensorboard: the package is not installed; pip install tensorboard") from None
    return SummaryWriter(str(folder.path / "tensorboard"))


def _open_wandb(args: Namespace, folder: RunFolder) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--report-to wandb: the package is not installed; pip install wandb") from None
    try:
        # A fixed id, so that a resumed run goes on in the same place.
        return wandb.init(
            project=args.wandb_project_name,
            name=args.name,
            id=args.name,
            notes=args.wandb_notes or None,
            config=vars(args),
            resume="allow",
            dir=str(folder.path),
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--report-to wandb: {reason}; run wandb login, or set WANDB_MODE=offline") from error
