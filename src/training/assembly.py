"""A run's parts, put together from resolved flags: data, objective, and what an epoch of training needs."""

from __future__ import annotations

from argparse import Namespace

import torch

from neuclip.objectives import OBJECTIVES, Objective, RunShape, build_objective
from training.checkpoint import TrainingState
from training.data import TrainLoader, build_train_loader
from training.data.pictures import take_apart
from training.distributed import World
from training.errors import UserError, reason_of
from training.finite import FiniteGuard
from training.loop import Training
from training.model import ModelBundle, is_convolutional, wrap
from training.optim import build_optimizer, parameter_groups
from training.params import data_config
from training.pixels import Pixels
from training.precision import Precision
from training.reporting import Reporter
from training.schedules import LearningRates


def open_data(args: Namespace, world: World, bundle: ModelBundle) -> TrainLoader:
    """This rank's training batches.

    Raises:
        UserError: flags that contradict each other or the data.
    """
    config = data_config(args, OBJECTIVES[args.objective].needs_keys)
    on_gpu = world.device.type == "cuda"
    return build_train_loader(
        config, bundle.preprocess_train, bundle.tokenizer, world.rank, world.size, pin_memory=on_gpu
    )


def objective_of_run(args: Namespace, world: World, bundle: ModelBundle, loader: TrainLoader) -> Objective:
    """The objective of --objective, on the run's device.

    Raises:
        UserError: it cannot be built for this model, or its tables and networks do not fit into memory.
    """
    batch_size = args.batch_size * args.accum_freq
    shape = RunShape(bundle.embed_dim, batch_size, world.size, loader.steps_per_epoch, args.epochs)
    try:
        return build_objective(args, shape).to(world.device)
    except (ValueError, RuntimeError, MemoryError) as error:
        # What depends on the model, and memory that does not suffice for tables or networks.
        raise UserError(f"--objective {args.objective} cannot be built: {reason_of(error)}") from error


def assemble(
    args: Namespace,
    world: World,
    bundle: ModelBundle,
    loader: TrainLoader,
    reporter: Reporter,
    objective: Objective,
) -> Training:
    """Optimizer and schedules around a model and its objective. All ranks call it: they talk to each other in it."""
    towers = bundle.towers
    model = wrap(args, towers, objective, world)
    optimizer = build_optimizer(args, parameter_groups(towers, towers.model.logit_scale, args.wd, objective))
    precision = Precision(args.precision, world.device.type)
    scaler = precision.grad_scaler()
    return Training(
        args=args,
        world=world,
        state=TrainingState(towers, objective, optimizer, scaler),
        model=model,
        loader=loader,
        rates=LearningRates(optimizer, args, loader.steps_per_epoch, towers.model.logit_scale),
        precision=precision,
        reporter=reporter,
        pixels=_pixels(bundle, world, precision),
        guard=FiniteGuard(world.rank, optimizer, scaler.is_enabled()),
    )


def _pixels(bundle: ModelBundle, world: World, precision: Precision) -> Pixels:
    """The counterpart of what the loader leaves out of the transform."""
    memory_format = torch.channels_last if is_convolutional(bundle.towers.model.visual) else torch.contiguous_format
    parts = take_apart(bundle.preprocess_train)
    mean, std = (None, None) if parts is None else (parts.mean, parts.std)
    return Pixels(world.device, precision.input_dtype, mean, std, memory_format)
