"""What a run is about to do, in the words of its resolved flags: printed and logged before the first step."""

from __future__ import annotations

import platform
import subprocess
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from neuclip.objectives import Objective, flags_without_effect
from training.data import TrainLoader
from training.distributed import World
from training.model import TwoTowers

_PACKAGES = ("torch", "open_clip_torch", "webdataset", "timm", "numpy")


def plan_lines(
    args: Namespace, world: World, towers: TwoTowers, objective: Objective, loader: TrainLoader
) -> list[str]:
    """The resolved plan, a list of aligned lines."""
    steps = loader.steps_per_epoch * args.epochs
    trainable = sum(p.numel() for p in towers.parameters() if p.requires_grad)
    total = sum(p.numel() for p in towers.parameters())
    rows = {
        "run": f"{args.name} in {args.logs}",
        "objective": f"{objective.name}: {objective.summary}",
        "temperature": f"starts at {1 / towers.model.logit_scale.exp().item():.4g}; learnt by "
        f"{objective.temperature_learning.value}",
        "ranks": f"{world.size} on {_device_name(world)}",
        "batch": _batch_in_words(args, world),
        "data": loader.data_description.replace("\n", "; "),
        "epoch": f"{loader.steps_per_epoch:,} steps, {loader.num_samples:,} samples",
        "samples seen": f"{loader.num_samples * args.epochs:,} in {args.epochs} epochs, {steps:,} steps"
        + (f"; stops after epoch {args.stop_epochs}" if args.stop_epochs < args.epochs else ""),
        "model": f"{args.model}, {total:,} parameters, {trainable:,} trainable",
        "precision": args.precision,
        "gradients": _gradients_in_words(args, world),
        "optimizer": _optimizer_in_words(args),
        "git": git_revision(),
        "versions": _versions(),
    }
    ignored = flags_without_effect(args)
    if ignored:
        rows["no effect"] = f"{', '.join(ignored)}: flags of other objectives"
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def git_revision() -> str:
    """The revision of the code, with a mark if files were changed since; "unknown" outside a checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _batch_in_words(args: Namespace, world: World) -> str:
    pieces = f" × {args.accum_freq} micro-batches" if args.accum_freq > 1 else ""
    return f"{args.batch_size} per rank{pieces}, {args.batch_size * args.accum_freq * world.size} in all"


def _optimizer_in_words(args: Namespace) -> str:
    moments = {"sgd": f"momentum {args.momentum:g}", "lion": f"betas {args.beta1:g} {args.beta2:g}"}
    adams = f"betas {args.beta1:g} {args.beta2:g}, eps {args.eps:g}"
    clipped = "" if args.grad_clip_norm is None else f", gradients clipped at {args.grad_clip_norm:g}"
    return (
        f"{args.optimizer}, lr {args.lr:g} ({args.lr_scheduler}, {args.warmup} steps of warmup), wd {args.wd:g}, "
        f"lr_tau {args.lr_tau:g} ({args.lr_tau_scheduler}), {moments.get(args.optimizer, adams)}{clipped}"
    )


def _gradients_in_words(args: Namespace, world: World) -> str:
    if world.size == 1:
        return "of one rank" + ("; --grad-compression has no effect" if args.grad_compression != "none" else "")
    travelling = "" if args.grad_compression == "none" else f", travelling in {args.grad_compression}"
    return f"averaged over the ranks{travelling}" + (", static graph" if args.ddp_static_graph else "")


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"{world.device.type}, {torch.get_num_threads()} threads each"


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return ", ".join(found)
