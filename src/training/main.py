"""Entry of training: `python -u src/training/main.py FLAGS`, `python -m training.main FLAGS`; alone, by torchrun, by srun."""

from __future__ import annotations

import logging
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Started as a file: its own folder, first on the path, would hide packages that share a name with our modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch.distributed as dist

from neuclip.objectives import OBJECTIVES
from training import distributed, garbage
from training.assembly import assemble, objective_of_run, open_data
from training.atomic_files import write_atomically
from training.bench_data import bench_data
from training.checkpoint import TrainingState, newest_checkpoint, read_checkpoint, remove_leftovers
from training.data import check_train_data
from training.distributed import World
from training.errors import OneRankError, UserError
from training.evaluate import Evaluator
from training.loop import Training, train_one_epoch
from training.model import build_model, check_model, copy_model_configs
from training.params import data_config, parse_args
from training.plan import plan_lines
from training.reporting import Reporter, log_to_file, start_logging
from training.run_folder import RunFolder, default_name
from training.table_files import remove_unused, save_tables

# A mistake in the flags is found by every rank on its own. The others leave time for rank 0 to say it: slurm ends all tasks
# when the first one fails.
_SECONDS_FOR_RANK_0 = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns the exit status: 0, or 2 after a user's mistake (one line on stderr)."""
    rank = distributed.environment()[0]
    try:
        args = parse_args(argv)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_SECONDS_FOR_RANK_0)
        return 2
    try:
        world = distributed.connect(args.device, args.dist_backend, args.dist_url, args.dist_timeout)
        start_logging(world, args.debug)
        if args.bench_data is None:
            train(args, world)
        else:
            bench_data(args, world)
    except UserError as error:
        # Without a process group this rank may be the only one that knows; with one, all ranks have the same message, or it
        # says that they have not.
        if rank == 0 or not dist.is_initialized() or isinstance(error, OneRankError):
            where = "" if rank == 0 else f"[rank {rank}] "
            print(f"{where}error: {error}", file=sys.stderr, flush=True)
        return 2
    # Only after success: leaving the group waits for the other ranks, and after an error they may wait for this one.
    distributed.disconnect()
    return 0


def train(args: Namespace, world: World) -> None:
    """The whole run, from resolved flags to the last checkpoint.

    Raises:
        UserError: a mistake in the flags or files, on all ranks together and before the first step.
    """
    args.name = world.from_main(args.name or default_name(args))
    folder = RunFolder(args.logs, args.name)
    world.check_together(lambda: _check_inputs(args, folder, world))

    bundle = world.check_together(lambda: build_model(args, OBJECTIVES[args.objective], world.device))
    loader = world.check_together(lambda: open_data(args, world, bundle))
    world.check_same((loader.steps_per_epoch, loader.data_description), f"--train-data {args.train_data}")
    reporter = world.check_together(lambda: Reporter(args, folder, world))
    objective = world.check_together(lambda: objective_of_run(args, world, bundle, loader))
    # Not a check: ranks talk to each other in it. What it refuses, it refuses on all of them.
    training = assemble(args, world, bundle, loader, reporter, objective)
    state = training.state
    evaluator = world.check_together(lambda: Evaluator(args, bundle, world, training.precision))
    # One rank chooses, so that all go on from the same file.
    checkpoint = world.from_main(
        world.check_together(lambda: _checkpoint_to_resume(args, folder) if world.is_main else None)
    )
    if checkpoint is not None:
        world.check_together(lambda: state.load(read_checkpoint(checkpoint), checkpoint, args.model))
        logging.info("resumed from %s: epoch %d, step %d", checkpoint, state.epoch, state.step)
        state.follow_schedule(loader.steps_per_epoch)
    world.check_together(lambda: _write_plan(args, world, folder, training))

    if world.from_main(state.epoch > 0 and not folder.has_results(state.epoch)):
        # The last run ended between saving this epoch and evaluating it.
        _evaluate(training, evaluator)
    if state.epoch >= args.stop_epochs:
        logging.info("nothing to do: epoch %d of %d is done", state.epoch, args.stop_epochs)
    with garbage.thawed_at_the_end():
        for epoch in range(state.epoch, args.stop_epochs):
            train_one_epoch(training, epoch)
            state.epoch = epoch + 1
            # Saved before it is evaluated: an evaluation that fails must not cost the epoch.
            _save(args, folder, state, world)
            _evaluate(training, evaluator)
    training.reporter.close()


def _evaluate(training: Training, evaluator: Evaluator) -> None:
    state = training.state
    metrics = evaluator(state.towers, state.epoch)
    if metrics:
        training.reporter.evaluation(state.epoch, state.step, metrics)


def _write_plan(args: Namespace, world: World, folder: RunFolder, training: Training) -> None:
    if not world.is_main:
        return
    folder.write_params(args)
    copy_model_configs(args.model_config, folder.model_configs)
    for line in plan_lines(args, world, training.state.towers, training.state.objective, training.loader):
        logging.info(line)


def _check_inputs(args: Namespace, folder: RunFolder, world: World) -> None:
    """Everything that can be known to be wrong before the model is built."""
    folder.check_new(args.resume)
    check_model(args)
    if args.batch_size * args.accum_freq * world.size < 2:
        raise UserError(f"--batch-size {args.batch_size} on one rank leaves a sample no negatives: give 2 or more")
    objective_class = OBJECTIVES[args.objective]
    check_train_data(data_config(args, objective_class.needs_keys), world_size=world.size)
    if args.resume and args.resume != "latest" and not Path(args.resume).is_file():
        raise UserError(f"--resume {args.resume}: there is no such file; give a checkpoint, or latest")
    if world.is_main:
        folder.create()
        remove_leftovers(folder.checkpoints)
        log_to_file(folder.path / "out.log")


def _checkpoint_to_resume(args: Namespace, folder: RunFolder) -> Path | None:
    if args.resume is None:
        return None
    if args.resume != "latest":
        return Path(args.resume)
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        logging.info("--resume latest: no checkpoint in %s yet, starting anew", folder.checkpoints)
    return newest


def _save(args: Namespace, folder: RunFolder, state: TrainingState, world: World) -> None:
    """Write what is due after an epoch. All ranks hand in their part of the state, rank 0 writes the files."""
    last = state.epoch == args.stop_epochs
    due = last or (args.save_frequency > 0 and state.epoch % args.save_frequency == 0)
    numbered, latest = folder.checkpoints / f"epoch_{state.epoch}.pt", folder.checkpoints / "epoch_latest.pt"
    paths = [path for path, wanted in ((numbered, due), (latest, args.save_most_recent)) if wanted]
    if not paths:
        return
    tables = save_tables(state.objective, folder.checkpoints, state.step, world)
    content = state.to_checkpoint(args.name, args.model, tables)
    if not world.is_main:
        return
    for path in paths:
        write_atomically(path, content)
        logging.info("saved %s", path)
    if due and args.delete_previous_checkpoint:
        _delete_before(state.epoch, folder)
    remove_unused(folder.checkpoints)


def _delete_before(epoch: int, folder: RunFolder) -> None:
    for path in folder.checkpoints.glob("epoch_*.pt"):
        number = path.stem.removeprefix("epoch_")
        if number.isdecimal() and int(number) < epoch:
            path.unlink()


def cli() -> None:
    """Console entry."""
    sys.exit(main())


if __name__ == "__main__":
    cli()
