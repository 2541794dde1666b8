"""--bench-data: the loader alone, exactly as training would build it, and where its time goes."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from neuclip.objectives import OBJECTIVES
from training.data import Batch, TrainLoader, build_train_loader, check_train_data
from training.data.config import resolve_dataset_type
from training.data.loader import PREFETCHED_BATCHES
from training.data.stages import BATCH, READ, STAGES, StageClock, StageTime
from training.distributed import World
from training.model import build_transforms, check_model
from training.params import data_config


@dataclass(frozen=True)
class LoaderTime:
    """A measurement of one rank's loader.

    Attributes:
        images: delivered to the training process, within `seconds`.
        stages: what each stage took in the workers meanwhile; "batch" is the whole.
    """

    images: int
    seconds: float
    stages: dict[str, StageTime]


def bench_data(args: Namespace, world: World) -> None:
    """Run the loader for --bench-data steps on every rank; rank 0 prints rates and a table of stages. Trains nothing.

    Raises:
        UserError: a mistake in the flags of model or data.
    """
    config = data_config(args, OBJECTIVES[args.objective].needs_keys)
    world.check_together(lambda: (check_model(args), check_train_data(config, world.size)))
    transforms = world.check_together(lambda: build_transforms(args))
    clock = StageClock(config.workers)
    on_gpu = world.device.type == "cuda"
    loader = world.check_together(
        lambda: build_train_loader(config, *transforms, world.rank, world.size, pin_memory=on_gpu, clock=clock)
    )
    world.check_same((loader.steps_per_epoch, loader.data_description), f"--train-data {args.train_data}")
    found = measure_loader(loader, clock, args.bench_data)
    everyone: list[LoaderTime] = [found]
    if world.size > 1:
        everyone = [found] * world.size
        dist.all_gather_object(everyone, found)
    if world.is_main:
        read = "tar read" if resolve_dataset_type(config) == "webdataset" else "row read"
        print("\n".join([loader.data_description, *report_lines(everyone, config.workers, read)]), flush=True)


def measure_loader(loader: TrainLoader, clock: StageClock, steps: int) -> LoaderTime:
    """Take `steps` batches as fast as they come, after as many others as it takes until every worker is at work.

    Args:
        loader: built with this clock.
        steps: may be more than an epoch has.
    """
    batches = _endless(loader)
    for _ in range(clock.workers * PREFETCHED_BATCHES):
        next(batches)
    before, began, images = clock.read(), time.perf_counter(), 0
    for _ in range(steps):
        images += len(next(batches).image)
    seconds = time.perf_counter() - began
    return LoaderTime(images, seconds, {stage: spent - before[stage] for stage, spent in clock.read().items()})


def report_lines(ranks: list[LoaderTime], workers: int, read: str) -> list[str]:
    """Rates and the table of stages.

    Args:
        ranks: what each rank measured. workers: loader processes of a rank, 0 for none. read: what to call the first stage.
    """
    rate = sum(found.images / found.seconds for found in ranks)
    where = f"{workers} workers a rank" if workers else "no workers: loaded in the training process"
    total = {stage: sum((found.stages[stage] for found in ranks), StageTime()) for stage in ranks[0].stages}
    other = total[BATCH]
    for stage in STAGES:
        other -= StageTime(0.0, total[stage].wall, total[stage].cpu)
    rows = {read if stage == READ else stage: total[stage] for stage in STAGES} | {"other": other}
    lines = [
        f"{rate:,.0f} images/s on {len(ranks)} ranks, {rate / (len(ranks) * max(workers, 1)):,.0f} per worker ({where})",
        "",
        "| stage | ms per image | of it at work | share | images/s alone |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, spent in rows.items():
        images = max(spent.images, 1.0)
        alone = f"{images / spent.wall:,.0f}" if spent.wall > 0 else "–"
        share = spent.wall / max(total[BATCH].wall, 1e-9)
        lines.append(
            f"| {name} | {1000 * spent.wall / images:.3f} | {1000 * spent.cpu / images:.3f} | {share:.0%} | {alone} |"
        )
    whole, images = total[BATCH], max(total[BATCH].images, 1.0)
    lines.append(
        f"| whole | {1000 * whole.wall / images:.3f} | {1000 * whole.cpu / images:.3f} | 100% "
        f"| {images / max(whole.wall, 1e-9):,.0f} |"
    )
    return lines


def _endless(loader: TrainLoader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1
