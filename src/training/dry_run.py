"""--dry-run: everything resolved as for a run, its plan printed, and two steps on synthetic data that leave nothing behind."""

from __future__ import annotations

import logging
import tempfile
from argparse import Namespace
from dataclasses import replace
from math import ceil

import torch

from neuclip.objectives import OBJECTIVES
from training import garbage
from training.assembly import assemble, objective_of_run, open_data
from training.data import TrainLoader, check_train_data
from training.distributed import World
from training.errors import AbsentDataError, OneRankError, UserError
from training.evaluate import Evaluator
from training.loop import Training, train_one_epoch
from training.model import ModelBundle, build_model, check_model
from training.params import data_config
from training.plan import plan_lines
from training.reporting import Reporter
from training.run_folder import RunFolder, default_name

STEPS = 2
# What a CPU computes within seconds, whatever the model: samples of a micro-batch, micro-batches of a step.
CPU_BATCH = 4
CPU_MICRO_BATCHES = 2
# Flags that say which data are read, and how.
_SYNTHETIC = {
    "train_data": None,
    "dataset_type": "synthetic",
    "dataset_resampled": False,
    "train_data_upsampling_factors": None,
}


def dry_run(args: Namespace, world: World) -> None:
    """Resolve flags, model, data (where they are there) and objective; print the plan; take two steps. Writes nothing.

    The plan is that of --dry-run RANKS ranks, or of those there are. The steps are taken by those there are, with a batch that
    a CPU computes within seconds, or that a GPU has memory for; what was made smaller is printed.

    Raises:
        UserError: a mistake in the flags, the model or data that are there, on all ranks together.
        OneRankError: the batch does not fit into the memory of one of several GPUs.
    """
    planned = World(0, args.dry_run or world.size, world.device)
    args.name = world.from_main(args.name or default_name(args))
    world.check_together(lambda: _check(args, planned))
    bundle = world.check_together(lambda: build_model(args, OBJECTIVES[args.objective], world.device))
    loader = world.check_together(lambda: _loader_of_plan(args, planned, bundle))
    with tempfile.TemporaryDirectory() as scratch, garbage.thawed_at_the_end():
        small, changes = _made_smaller(Namespace(**{**vars(args), "logs": scratch}), world, planned)
        training = _prepare(small, world, bundle)
        _print_plan(args, planned, training, loader)
        _check_evaluation_sets(args, bundle, training)
        small, changes = _take_steps(small, world, bundle, training, changes)
    _print_end(small, world, changes)


def _check(args: Namespace, planned: World) -> None:
    check_model(args)
    RunFolder(args.logs, args.name).check_new(args.resume)
    if args.batch_size * args.accum_freq * planned.size < 2:
        raise UserError(f"--batch-size {args.batch_size} on one rank leaves a sample no negatives: give 2 or more")


def _loader_of_plan(args: Namespace, planned: World, bundle: ModelBundle) -> TrainLoader:
    """The run's own loader, to be asked for its numbers; where the data are absent, one with as many samples."""
    # It is never started, and its processes need not suit this machine.
    asked = Namespace(**{**vars(args), "workers": 0})
    try:
        check_train_data(data_config(asked, OBJECTIVES[args.objective].needs_keys), planned.size)
        return open_data(asked, planned, bundle)
    except AbsentDataError as error:
        loader = open_data(Namespace(**{**vars(asked), **_SYNTHETIC}), planned, bundle)
        counted = "--train-num-samples" if args.train_num_samples else "made up, since --train-num-samples is not given"
        loader.data_description = f"NOT HERE ({error}); samples of an epoch: {counted}"
        return loader


def _made_smaller(args: Namespace, world: World, planned: World) -> tuple[Namespace, list[str]]:
    """The flags of the steps, and in words what they changed."""
    small = Namespace(**{**vars(args), **_SYNTHETIC})
    # 1 epoch of a few steps; schedules that count epochs keep their number, --epochs.
    small.stop_epochs, small.workers, small.log_every_n_steps = 1, 0, 1
    small.report_to, small.profile = "", False
    changes = []
    if world.device.type == "cpu":
        small.batch_size = min(max(args.batch_size, 2), CPU_BATCH)
        small.accum_freq = min(args.accum_freq, CPU_MICRO_BATCHES)
        # A convolution in bfloat16 takes a CPU that was not made for it a hundred times as long.
        small.precision = "fp32" if args.precision.startswith("amp") else args.precision
        changes += [
            f"--{name.replace('_', '-')} {getattr(args, name)} → {getattr(small, name)}"
            for name in ("batch_size", "accum_freq", "precision")
            if getattr(args, name) != getattr(small, name)
        ]
    if world.size != planned.size:
        changes.append(f"{planned.size} ranks → {world.size}")
    small.train_num_samples = STEPS * small.batch_size * small.accum_freq * world.size
    if args.data_size is not None and OBJECTIVES[args.objective].needs_keys:
        # A GPU gets the share of the tables that it would have; a login node has no room for them.
        share = ceil(args.data_size * world.size / planned.size) if world.device.type == "cuda" else 0
        small.data_size = min(args.data_size, max(share, small.train_num_samples))
        if small.data_size != args.data_size:
            changes.append(f"--data_size {args.data_size} → {small.data_size}")
    return small, changes


def _prepare(args: Namespace, world: World, bundle: ModelBundle) -> Training:
    loader = world.check_together(lambda: open_data(args, world, bundle))
    objective = world.check_together(lambda: objective_of_run(args, world, bundle, loader))
    reporter = world.check_together(lambda: _reporter(args, world))
    return assemble(args, world, bundle, loader, reporter, objective)


def _reporter(args: Namespace, world: World) -> Reporter:
    folder = RunFolder(args.logs, args.name)
    folder.create()
    return Reporter(args, folder, world)


def _print_plan(args: Namespace, planned: World, training: Training, loader: TrainLoader) -> None:
    for line in plan_lines(args, planned, training.state.towers, training.state.objective, loader):
        logging.info(line)


def _check_evaluation_sets(args: Namespace, bundle: ModelBundle, training: Training) -> None:
    """Say of an evaluation set that cannot be opened; like the training data it may lie elsewhere."""
    try:
        Evaluator(args, bundle, replace(training.world, size=1, rank=0), training.precision)
    except UserError as error:
        logging.warning("evaluation: %s", error)


def _take_steps(
    args: Namespace, world: World, bundle: ModelBundle, training: Training, changes: list[str]
) -> tuple[Namespace, list[str]]:
    """An epoch of STEPS steps; of a batch that does not fit into one GPU's memory the half, and so on.

    Returns:
        The flags that were possible, and what was changed from those of the run.
    """
    asked = args.batch_size
    while True:
        try:
            train_one_epoch(training, epoch=0)
            break
        except torch.OutOfMemoryError as error:
            remedy = f"--batch-size {args.batch_size} does not fit into the GPU's memory: give --accum-freq"
            if world.size > 1 or args.batch_size < 4:
                raise OneRankError(f"{remedy} or --grad-checkpointing") from error
        # Outside the handler, whose traceback would hold on to what did not fit.
        args.batch_size //= 2
        args.train_num_samples = STEPS * args.batch_size * args.accum_freq
        del training
        torch.cuda.empty_cache()
        training = _prepare(args, world, bundle)
    if args.batch_size < asked:
        changes = [*changes, f"--batch-size {asked} → {args.batch_size}, for want of memory: give --accum-freq"]
    findings = training.guard.findings(wait=True)
    if findings:
        logging.warning("dry run: the loss or a gradient was not finite in %d of %d steps", len(findings), STEPS)
    return args, changes


def _print_end(args: Namespace, world: World, changes: list[str]) -> None:
    if not world.is_main:
        return
    memory = ""
    if world.device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated(world.device) / 2**30:.1f} GiB of GPU memory at most"
    samples = args.batch_size * args.accum_freq * world.size
    logging.info("dry run: %d steps of %d synthetic samples done%s; nothing was kept", STEPS, samples, memory)
    logging.info("dry run: made smaller for the steps: %s", "; ".join(changes) or "nothing")
