"""Entry of training: `python -u src/training/main.py FLAGS`, `python -m training.main FLAGS`; alone, by torchrun, by srun."""

from __future__ import annotations

import logging
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:
    # Started as a file: its own folder, first on the path, would hide packages that share a name with our modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    # Importing takes a while, longest on a cluster's file system, and what SIGUSR1 does by itself is to kill: a job warned
    # meanwhile would have failed. It is kept until somebody heeds it (Signals).
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

import numpy as np

from evaluation.ranks import environment
from neuclip.objectives import OBJECTIVES
from training import distributed, garbage
from training.assembly import assemble, objective_of_run, open_data
from training.bench_data import bench_data
from training.boundary import Boundary, Ending
from training.checkpoint import Continuation, check_whole, newest_checkpoint, read_checkpoint, remove_leftovers
from training.checkpoint_writer import CheckpointWriter
from training.data import NoUsableSamplesError, check_train_data
from training.distributed import World
from training.dry_run import dry_run
from training.errors import OneRankError, OtherRankError, UserError
from training.evaluate import Evaluator
from training.failures import END_SECONDS, FailureWatch, end_process
from training.finite import NonFiniteLog
from training.loop import Training, train_one_epoch
from training.model import build_model, check_model, copy_model_configs
from training.params import data_config, parse_args
from training.pictures import draw_pictures
from training.plan import plan_lines
from training.preemption import EXIT_INTERRUPTED, REQUEUE_SECONDS, Signals, is_preempted, requeue_job
from training.random_state import seed_generators, set_rng_state
from training.remote_files import Remote
from training.remote_sync import RemoteSync, fetch_newest
from training.reporting import Reporter, log_to_file, start_logging
from training.run_folder import RunFolder, cut_back, default_name
from training.saving import Saver

# A mistake in the flags is found by every rank on its own. The others leave time for rank 0 to say it: slurm ends all tasks
# when the first one fails.
_SECONDS_FOR_RANK_0 = 10.0
MISTAKE = 2
# How long the end of a run waits for its remote copy.
SYNC_SECONDS = 600.0
SYNC_SECONDS_OF_INTERRUPTED = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns:
        The exit status: 0; 2 after a user's mistake (one line on stderr); 75 when the run was interrupted and can go on with
        --resume latest; 1 when it ended itself for another reason (the log's last line).
    """
    started = time.monotonic()
    rank = environment()[0]
    try:
        args = parse_args(argv)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_SECONDS_FOR_RANK_0)
        return MISTAKE

    def before_training(asked: signal.Signals) -> None:
        if not args.requeue_on_signal or asked == signal.SIGINT:
            return
        if rank > 0:
            # The launcher ends all ranks when the first one has ended.
            time.sleep(REQUEUE_SECONDS)
        elif asked == signal.SIGUSR1 or is_preempted():
            requeue_job()

    try:
        with Signals(before_training) as signals:
            return _run(args, signals, started)
    finally:
        distributed.release_channels()


def _run(args: Namespace, signals: Signals, started: float) -> int:
    failures = None
    try:
        world = distributed.connect(args.device, args.dist_backend, args.dist_url, args.dist_timeout, args.eval_timeout)
        start_logging(world, args.debug)
        failures = FailureWatch(world, args.dist_url)
        signals.end = partial(failures.end_all, status=EXIT_INTERRUPTED, what="was asked to end")
        status = 0
        if args.dry_run is not None:
            dry_run(args, world)
        elif args.bench_data is not None:
            bench_data(args, world)
        else:
            status = train(args, world, signals, failures, started)
    except OtherRankError as error:
        # That rank tells why, and ends this process through its note.
        time.sleep(END_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except (UserError, NoUsableSamplesError) as error:
        message = f"error: {error if isinstance(error, UserError) else _said_by_worker(error)}"
        is_everyones = isinstance(error, UserError) and not isinstance(error, OneRankError)
        if failures is not None and world.size > 1 and not is_everyones:
            failures.end_all(message, MISTAKE)
        # Without a process group this rank may be the only one that knows; with one, all ranks have the same message.
        rank = environment()[0]
        if rank == 0 or failures is None or not is_everyones:
            print(message if rank == 0 else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
        return MISTAKE
    except Exception:
        if failures is None or world.size == 1:
            raise
        failures.end_all(traceback.format_exc(), status=1)
    # Only when all is well: leaving the group waits for the other ranks, and after an error they may wait for this one.
    failures.close()
    distributed.disconnect()
    return status


def _said_by_worker(error: Exception) -> str:
    """The loader repeats a worker's whole traceback, whose last line is the exception's name and message."""
    line = str(error).strip().splitlines()[-1]
    return line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def train(args: Namespace, world: World, signals: Signals, failures: FailureWatch, started: float) -> int:
    """The whole run, from resolved flags to the last checkpoint.

    Args:
        signals: by which it may be asked to end. failures: by which a rank that fails ends the others.
        started: time.monotonic() at the start, from which --max-hours counts.

    Returns:
        The exit status.

    Raises:
        UserError: a mistake in the flags or files, on all ranks together and before the first step.
    """
    args.name = world.from_main(args.name or default_name(args))
    folder = RunFolder(args.logs, args.name)
    try:
        return _train(args, folder, world, signals, failures, started)
    finally:
        folder.release()


def _train(
    args: Namespace, folder: RunFolder, world: World, signals: Signals, failures: FailureWatch, started: float
) -> int:
    world.check_together(lambda: _check_inputs(args, folder, world))

    bundle = world.check_together(lambda: build_model(args, OBJECTIVES[args.objective], world.device))
    loader = world.check_together(lambda: open_data(args, world, bundle))
    loader.give_up = lambda message: failures.end_all(f"error: {message}", MISTAKE)
    world.check_same((loader.steps_per_epoch, loader.data_description), f"--train-data {args.train_data}")
    reporter = world.check_together(lambda: Reporter(args, folder, world))
    objective = world.check_together(lambda: objective_of_run(args, world, bundle, loader))
    # Not a check: ranks talk to each other in it. What it refuses, it refuses on all of them.
    training = assemble(args, world, bundle, loader, reporter, objective)
    evaluator = world.check_together(
        lambda: Evaluator(args, bundle, world, training.precision, lambda: signals.received is not None)
    )
    first_step, there = _resume(args, folder, training)
    world.check_together(lambda: _write_plan(args, world, folder, training))
    saver = Saver(folder, training, *world.check_together(lambda: _outlets(args, folder, world)))
    if there is not None:
        saver.resume(there)
    boundary = Boundary(training, saver, signals, NonFiniteLog(folder.path / "nonfinite.jsonl"), started)
    signals.armed = True
    with garbage.thawed_at_the_end():
        ending = _epochs(training, evaluator, saver, boundary, folder, first_step)
    # A warned process has few minutes left, and the job is not requeued before this.
    saver.close(SYNC_SECONDS if ending is None else SYNC_SECONDS_OF_INTERRUPTED)
    status = 0 if ending is None else _end(args, world, ending)
    reporter.close()
    return status


def _epochs(
    training: Training, evaluator: Evaluator, saver: Saver, boundary: Boundary, folder: RunFolder, first_step: int
) -> Ending | None:
    """From where the run stands to its last epoch, or to where it has to end."""
    args, state, world = training.args, training.state, training.world
    if first_step == 0 and world.from_main(state.epoch > 0 and not folder.has_results(state.epoch)):
        # The last run ended between saving this epoch and evaluating it.
        _evaluate(training, evaluator)
        ending = boundary.after_evaluation(steps_done=0)
        if ending is not None:
            return ending
    if state.epoch >= args.stop_epochs:
        logging.info("nothing to do: epoch %d of %d is done", state.epoch, args.stop_epochs)
    for epoch in range(state.epoch, args.stop_epochs):
        if first_step == 0:
            saver.start_epoch()
        ending = train_one_epoch(training, epoch, first_step, boundary)
        if ending is not None:
            return ending
        first_step = 0
        state.epoch = epoch + 1
        # Saved before it is evaluated: an evaluation that fails must not cost the epoch.
        saver.finish_report()
        saver.after_epoch(boundary.save_is_due)
        ending = boundary.after_epoch()
        if ending is None:
            _evaluate(training, evaluator)
            ending = boundary.after_evaluation(training.loader.steps_per_epoch)
        if ending is not None:
            return ending
    return None


def _end(args: Namespace, world: World, ending: Ending) -> int:
    if world.is_main:
        said = logging.warning if ending.status == EXIT_INTERRUPTED else logging.error
        said("%s: ended with status %d", ending.reason, ending.status)
        if ending.status == EXIT_INTERRUPTED and args.requeue_on_signal and (ending.requeues or is_preempted()):
            requeue_job()
    # The launcher kills all ranks when the first one has ended with a status like this: not before rank 0 has written its
    # files and has asked for the job to be requeued.
    world.from_main(None)
    return ending.status


def _resume(args: Namespace, folder: RunFolder, training: Training) -> tuple[int, Continuation | None]:
    """Load the checkpoint that --resume names.

    Returns:
        The step of the epoch at which the run goes on, and what the checkpoint says of how it went on.

    Raises:
        UserError: there is none such, or it does not fit; on all ranks together.
    """
    world, state, loader = training.world, training.state, training.loader
    # One rank chooses, so that all go on from the same file.
    checkpoint = world.from_main(
        world.check_together(lambda: _checkpoint_to_resume(args, folder) if world.is_main else None)
    )
    if checkpoint is None:
        # A process that ended before its first checkpoint may have told of steps that now come again.
        world.check_together(lambda: _cut_back(folder, 0) if world.is_main and args.resume else None)
        return 0, None
    there = world.check_together(lambda: state.load(read_checkpoint(checkpoint), checkpoint, args.model))
    saved_step = state.step
    within = there is not None and there.step_in_epoch > 0
    first_step = world.check_together(lambda: loader.resume_at(there.data if within else None, state.epoch))
    state.follow_schedule(loader.steps_per_epoch, first_step)
    if within:
        _restore_generators(args, training, there, first_step)
    if world.is_main:
        logging.info("resumed from %s: epoch %d, step %d", checkpoint, state.epoch, state.step)
    # The log counts in the steps of the run that wrote it.
    world.check_together(lambda: _cut_back(folder, saved_step) if world.is_main else None)
    return first_step, there


def _cut_back(folder: RunFolder, step: int) -> None:
    for path in (folder.metrics, folder.results):
        try:
            cut_back(path, step)
        except OSError as error:
            raise UserError(
                f"--resume: {path} cannot be cut back to step {step} ({error.strerror}); make room there"
            ) from None


def _restore_generators(args: Namespace, training: Training, there: Continuation, first_step: int) -> None:
    world, state = training.world, training.state
    if len(there.rng) == world.size:
        set_rng_state(there.rng[world.rank], world.device)
    else:
        parts = [args.seed, state.epoch, first_step, world.rank]
        seed_generators(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))


def _outlets(args: Namespace, folder: RunFolder, world: World) -> tuple[CheckpointWriter, RemoteSync | None]:
    """What writes checkpoints, and what copies them elsewhere: on rank 0.

    To be called when the run folder is as the run goes on from it, and before the loader starts processes: both have a
    thread, and a process that is forked in the moment a thread starts can hang.
    """
    sync = RemoteSync(args.remote_sync, folder) if args.remote_sync and world.is_main else None
    if sync is not None:
        sync.start()
    writer = CheckpointWriter(
        folder.checkpoints,
        in_background=args.save_in_background and world.is_main,
        keep_last=args.keep_last,
        delete_previous=args.delete_previous_checkpoint,
        on_saved=None if sync is None else sync.saved,
    )
    return writer, sync


def _evaluate(training: Training, evaluator: Evaluator) -> None:
    state = training.state
    metrics = evaluator(state.towers, state.epoch)
    if not metrics:
        return
    reporter = training.reporter
    reporter.evaluation(state.epoch, state.step, metrics)
    if reporter.shows_pictures:
        args, folder = training.args, reporter.folder.path
        pictures = draw_pictures(folder, args, state.epoch, evaluator.pairs, evaluator.last_features)
        reporter.pictures(state.step, pictures)
    evaluator.last_features = None  # they need not lie in memory while the run goes on


def _write_plan(args: Namespace, world: World, folder: RunFolder, training: Training) -> None:
    if not world.is_main:
        return
    try:
        changed = folder.changed_flags(args)
        if changed:
            # The same command with other flags is as likely meant as another run, for which its --name was not changed.
            logging.warning("run %s goes on with other flags than before: %s", args.name, "; ".join(changed))
        folder.write_params(args)
        copy_model_configs(args.model_config, folder.model_configs)
    except OSError as error:
        raise UserError(
            f"--logs {args.logs}: cannot write to {folder.path} ({error.strerror}); make room there"
        ) from None
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
        raise UserError(
            f"--resume {args.resume}: there is no such file; give a checkpoint that all nodes see, or latest"
        )
    if world.is_main:
        if args.remote_sync:
            Remote(args.remote_sync, folder.name).check(args.resume)
        folder.create()
        folder.hold()
        remove_leftovers(folder.checkpoints)
        if args.resume == "latest" and args.remote_sync:
            # Before anything is written here that the remote copy has too.
            fetch_newest(args.remote_sync, folder)
        log_to_file(folder.path / "out.log")


def _checkpoint_to_resume(args: Namespace, folder: RunFolder) -> Path | None:
    if args.resume is None:
        return None
    if args.resume != "latest":
        check_whole(Path(args.resume))
        return Path(args.resume)
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        logging.info("--resume latest: no checkpoint in %s yet, starting anew", folder.checkpoints)
    return newest


def cli() -> None:
    """Console entry."""
    status = main()
    if status == EXIT_INTERRUPTED:
        # At once: a rank that still leaves the interpreter when the first one has ended is killed by the launcher, and the
        # status of all would be that one's.
        end_process(status)
    sys.exit(status)


if __name__ == "__main__":
    cli()
