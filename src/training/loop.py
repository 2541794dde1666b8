"""The training loop. It knows batches, features, an objective and an optimizer; it knows no method."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neuclip.objectives import Output
from training import garbage
from training.accumulation import (
    backward_in_micro_batches,
    random_state_kept,
    running_statistics_kept,
    split_batch,
)
from training.checkpoint import TrainingState
from training.data import Batch, TrainLoader
from training.data_parallel import settle_buckets
from training.distributed import World
from training.errors import OneRankError
from training.finite import FiniteGuard
from training.interval import Interval
from training.pixels import Pixels
from training.precision import Precision
from training.prefetch import Prefetcher, mover_for
from training.random_state import seed_generators
from training.reporting import Reporter, progress_bar, reduce_metrics
from training.schedules import LearningRates

if TYPE_CHECKING:
    from training.boundary import Boundary, Ending


@dataclass
class Training:
    """What an epoch needs.

    Attributes:
        state: what is learnt. model: state.towers, compiled and distributed as asked for.
        pixels: makes of a batch's images what the towers take.
        guard: finds what is not finite.
        has_settled: whether gradients travel as they will until the end of this process (`settle_buckets`).
    """

    args: Namespace
    world: World
    state: TrainingState
    model: nn.Module
    loader: TrainLoader
    rates: LearningRates
    precision: Precision
    reporter: Reporter
    pixels: Pixels
    guard: FiniteGuard
    has_settled: bool = False

    def encode(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What a module (`model` or `state.towers`) makes of a batch, wherever it is, as TwoTowers.forward returns it."""
        image = self.pixels(batch.image)
        text = batch.text.to(self.world.device, non_blocking=True)
        with self.precision.autocast():
            return module(image, text)

    def check_keys(self, batch: Batch) -> None:
        """Check the keys of a batch that is still in host memory; on the device, looking at them would wait for it.

        Raises:
            OneRankError: the objective has no place for one of them.
        """
        if batch.keys is None:
            return
        try:
            self.state.objective.check_keys(batch.keys)
        except ValueError as error:
            raise OneRankError(str(error)) from None

    def keys_of(self, batch: Batch) -> Tensor | None:
        """[B] int64 on the device, where the batch has keys."""
        return None if batch.keys is None else batch.keys.to(self.world.device, non_blocking=True)

    def settle(self, batch: Batch) -> None:
        """Pass once through the towers, without a trace, so that every step from here on is rounded alike."""
        if not self.has_settled and self.world.size > 2:
            first = split_batch(batch, self.args.accum_freq)[0]
            with random_state_kept(self.world.device), running_statistics_kept(self.state.towers):
                settle_buckets(self.model, lambda: self.encode(self.model, first))
        self.has_settled = True

    def batches(self, on_host: Iterator[Batch]) -> Prefetcher:
        """The same batches with their keys checked, on the device already where that is a GPU and a batch fits."""
        return Prefetcher(on_host, self.check_keys, mover_for(self.world.device, self.args.accum_freq))


def train_one_epoch(
    training: Training, epoch: int, first_step: int = 0, boundary: Boundary | None = None
) -> Ending | None:
    """Go once through the training data.

    Args:
        epoch: counts from 0.
        first_step: steps of this epoch already taken, when a run goes on within it. The random state is left as it is then.
        boundary: is asked after every step but the epoch's last whether something is due, or the run is to end.

    Returns:
        Why the run is to end before the epoch does; None if the epoch is through.
    """
    args, state = training.args, training.state
    if first_step == 0:
        _seed(args.seed, epoch, training.world.rank)
    training.model.train()
    state.objective.start_epoch(epoch)
    steps = training.loader.steps_per_epoch
    interval = Interval(training.world.device.type == "cuda", state.objective.stopwatch)
    bar = progress_bar(training.world, steps, f"epoch {epoch + 1}/{args.epochs}", first_step)
    with bar, _profiler(args, training.world, epoch, steps) as profiler:
        batches = training.batches(interval.timed(training.loader.epoch(epoch)))
        for index, batch in enumerate(batches, first_step):
            is_logged = index == 0 or (index + 1) % args.log_every_n_steps == 0 or index + 1 == steps
            state.objective.report = is_logged
            training.rates.set(state.step)
            state.objective.temperature_lr = training.rates.temperature(state.step)
            training.settle(batch)
            interval.step_begins()
            output = training_step(training, batch)
            interval.step_ends()
            # Before anything below waits for the device: the next batch arrives while it works.
            batches.fetch()
            state.step += 1
            bar.update()
            if profiler is not None:
                profiler.step()
            if is_logged:
                _log(training, epoch, index, output, interval, bar)
                interval.restart()
            if index == first_step:
                # Now, and not before, there is everything that stays: optimizer state, workspaces, what the first step
                # imported or compiled.
                garbage.freeze_once()
            ending = None if boundary is None else boundary.after_step(index + 1, interval)
            if ending is not None:
                return ending
    return None


def training_step(training: Training, batch: Batch) -> Output:
    """Forward, objective, backward, clip, optimizer, clamp: one update. With adamw and sgd nothing waits for the device."""
    state, guard = training.state, training.guard
    if training.args.accum_freq > 1:
        output = backward_in_micro_batches(training, batch)
    else:
        keys = training.keys_of(batch)
        encoded = training.encode(training.model, batch)
        output = state.objective(*encoded, keys)
        start = guard.gradient_of_loss(output.loss, *encoded[:2])
        state.scaler.scale(output.loss).backward(start)
    norm = None
    if training.args.grad_clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.towers.parameters(), training.args.grad_clip_norm)
    temperature = (-state.towers.model.logit_scale.detach()).exp()
    # The objective's own parameters are not clipped.
    is_whole = all(group["role"] != "objective" for group in state.optimizer.param_groups)
    if guard.may_update(norm if is_whole else None):
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.towers.clamp_logit_scale()
    guard.step_done(state.step + 1, temperature, output.log_normalizers, batch.keys)
    return output


def _log(training: Training, epoch: int, index: int, output: Output, interval: Interval, bar: tqdm) -> None:
    args, state, world = training.args, training.state, training.world
    temperature = (-state.towers.model.logit_scale.detach()).exp().reshape(())
    device_values = {"loss": output.loss, "temperature": temperature, **output.metrics}
    for name, rate in training.rates.current().items():
        device_values[name] = torch.as_tensor(rate, dtype=torch.float64, device=world.device)
    # Averaged over the ranks: in a collective all wait for the slowest, and the maximum would count the waiting as work.
    for name, seconds in interval.section_seconds().items():
        device_values[f"{name}_seconds"] = torch.as_tensor(seconds, dtype=torch.float64, device=world.device)
    values = reduce_metrics(device_values, world)

    per_step = interval.seconds_per_step()
    samples = args.batch_size * args.accum_freq * world.size
    remaining = (args.stop_epochs - epoch) * training.loader.steps_per_epoch - index - 1
    values.update(
        epoch=epoch + (index + 1) / training.loader.steps_per_epoch,
        samples=state.step * samples,
        samples_per_second=samples / per_step,
        seconds_per_step=per_step,
        data_wait_share=interval.data_share(),
    )
    training.reporter.training(state.step, values)
    if not world.is_main:
        return
    bar.set_postfix_str(f"loss {values['loss']:.4f}")
    shown = [f"{name} {values[name]:.4f}" for name in ("contrastive_loss", "global_loss") if name in values]
    logging.info(
        "epoch %d/%d  step %d/%d  loss %.4f  %s  τ %.4f  lr %s  lr_tau %s  %.0f samples/s  data wait %.0f %%  ETA %s",
        epoch + 1,
        args.epochs,
        index + 1,
        training.loader.steps_per_epoch,
        values["loss"],
        "  ".join(shown),
        values["temperature"],
        *(f"{values[name]:.3g}" if name in values else "none" for name in ("lr", "lr_tau")),
        values["samples_per_second"],
        100 * values["data_wait_share"],
        timedelta(seconds=round(remaining * per_step)),
    )


def _seed(seed: int, epoch: int, rank: int) -> None:
    # Dropout and patch dropout start every epoch from a state of their own, so that a resumed run draws what an
    # uninterrupted one does. Nothing here draws from the other two, but what a user adds may.
    seed_generators((seed * 1_000_003 + epoch) * 100_003 + rank)


@contextmanager
def _profiler(args: Namespace, world: World, epoch: int, steps: int) -> Iterator[torch.profiler.profile | None]:
    if not (args.profile and world.is_main and epoch == 0):
        yield None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    trace = Path(args.logs) / args.name / "profile.json"

    def save(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(trace))
        logging.info("profile of %d steps in %s", active, trace)

    # The first steps are unlike the others; an epoch that has no more than those is traced whole.
    skipped, active = (2, 4) if steps >= 8 else (0, steps)
    schedule = torch.profiler.schedule(wait=skipped, warmup=skipped, active=active, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=save) as profiler:
        yield profiler
