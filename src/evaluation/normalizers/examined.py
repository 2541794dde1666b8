"""What is examined: a checkpoint's model together with its objective, as training would go on with both."""

from __future__ import annotations

from argparse import Action, ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.errors import UNREADABLE, UserError, reason_of
from evaluation.records import read_records
from evaluation.run_folder import Checkpoint, LoadedModel, RunFolder
from evaluation.sample_tables import load_tables
from neuclip.objectives import OBJECTIVES, Objective, RunShape, add_arguments, build_objective


@dataclass
class Examined:
    """A checkpoint, ready to be asked for its normalizers.

    Attributes:
        run, checkpoint: where it comes from.
        loaded: the model with preprocessing and tokenizer.
        objective: with all it had learnt.
        logit_scale: 1/τ, 0-dim float32. logit_bias: 0-dim, or None.
        step, epoch: optimizer steps taken, epochs completed.
    """

    run: RunFolder
    checkpoint: Checkpoint
    loaded: LoadedModel
    objective: Objective
    logit_scale: Tensor
    logit_bias: Tensor | None
    step: int
    epoch: int

    def forget_objective(self) -> None:
        """Let go of it: tables by sample may be most of the memory."""
        self.objective = Objective()


def objective_arguments(run: RunFolder) -> Namespace:
    """The flags of the run's objective as the run had resolved them, from params.txt.

    Raises:
        UserError: params.txt names no objective of this version.
    """
    parser = ArgumentParser(add_help=False)
    add_arguments(parser)
    args = parser.parse_args([])
    for action in parser._actions:
        text = run.texts.get(action.dest)
        if text is not None:
            setattr(args, action.dest, _typed(action, text))
    if args.objective not in OBJECTIVES:
        raise UserError(f"{run.path}/params.txt says objective: {args.objective}; known are {', '.join(OBJECTIVES)}")
    args.seed, args.epochs = int(run.params.get("seed") or 0), int(run.params.get("epochs") or 1)
    return args


def _typed(action: Action, text: str) -> Any:
    """The value that a flag had, from how params.txt writes it."""
    if text == "None":
        return None
    if action.nargs == 0 or isinstance(action, BooleanOptionalAction):
        return text == "True"
    return action.type(text) if callable(action.type) else text


def global_batch_size(run: RunFolder) -> int:
    """N = samples per step of a run on all its ranks, by its log of metrics; else by its flags, as if on one rank."""
    for record in read_records(run.path / "metrics.jsonl"):
        samples, step = record.get("samples"), record.get("step")
        if isinstance(samples, int | float) and isinstance(step, int) and step > 0:
            return round(samples / step)
    return int(run.params.get("batch_size") or 0) * int(run.params.get("accum_freq") or 1)


def open_examined(
    run: RunFolder,
    checkpoint: Checkpoint,
    batch_size: int,
    device: torch.device | str = "cpu",
    world_size: int = 1,
) -> Examined:
    """Load a checkpoint's model and objective. All ranks call it together.

    Args:
        checkpoint: one of the run's.
        batch_size: N, the global batch that the objective is to see.

    Raises:
        UserError: the checkpoint is missing, cannot be read, has no objective, or does not fit params.txt.
    """
    loaded = run.load_checkpoint(checkpoint, device)
    try:
        # Mapped: the towers' weights and the optimizer's state stay on the disk.
        content = torch.load(checkpoint.path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise UserError(f"{checkpoint.path} cannot be read: {reason_of(error)}") from None
    if not isinstance(content.get("objective"), dict) or "state_dict" not in content["objective"]:
        raise UserError(f"{checkpoint.path} has no objective: it was not written by this trainer")
    arguments = objective_arguments(run)
    steps = content.get("position", {}).get("steps_per_epoch") or content["step"] // max(1, content["epoch"])
    model: Any = loaded.model
    scale = model.logit_scale.detach().float().exp().reshape(()).to(device)
    bias = getattr(model, "logit_bias", None)
    bias = content.get("logit_bias") if bias is None else bias
    text_features = model.encode_text(loaded.tokenizer(["a"]).to(device))
    shape = RunShape(text_features.shape[1], batch_size // world_size, world_size, max(1, steps), arguments.epochs)
    try:
        objective = build_objective(arguments, shape).to(device)
        objective.load_state_dict(content["objective"]["state_dict"])
    except (RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the objective of {checkpoint.path} does not fit {run.path}/params.txt: {reason_of(error)}"
        ) from error
    if "tables" in content:
        load_tables(objective, checkpoint.path.parent / content["tables"])
    objective.report = False
    bias = None if bias is None else bias.detach().float().reshape(()).to(device)
    return Examined(run, checkpoint, loaded, objective, scale, bias, int(content["step"]), int(content["epoch"]))
