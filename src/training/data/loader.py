"""Puts a rank's loader together from the flags."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from training.data.config import Batch, DataConfig, check_flags, parse_factors, resolve_dataset_type
from training.data.pictures import Preprocess, make_pictures
from training.data.plan import DealtOrder, DrawnOrder, ExactOrder, Layout, ShardOrder, plan_steps
from training.data.shards import Shard, expand_sources
from training.data.sizes import SizedShards, find_sizes
from training.data.sources import ShardSource
from training.data.stages import StageClock
from training.data.stream import BatchDataset, SampleSource, Tokenizer
from training.data.streams import end_commands
from training.data.tables import SYNTHETIC_STEPS, CsvRows, RowSource, SyntheticRows, read_csv
from training.data.tokens import quick_tokenizer

T = TypeVar("T")
PREFETCHED_BATCHES = 2


class TrainLoader:
    """The training batches of one rank, epoch by epoch.

    steps_per_epoch: batches of an epoch, the same on every rank.
    num_samples: samples of an epoch over all ranks (steps_per_epoch · batch_size · world_size).
    data_description: one or two lines for the run's plan: kind, shards, samples, and how exact an epoch is.
    """

    def __init__(self, dataset: BatchDataset, workers: int, pin_memory: bool, data_description: str) -> None:
        """workers: processes, 0 for none."""
        self.steps_per_epoch: int = dataset.layout.steps
        self.num_samples: int = dataset.layout.num_samples
        self.data_description = data_description
        self._position = dataset.position
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,  # The dataset yields whole batches.
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCHED_BATCHES if workers > 0 else None,
            worker_init_fn=_start_worker,
            # It draws a seed for each epoch, unused here, that must not come out of the training process's generator.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch: exactly steps_per_epoch − first_step, a function of (seed, epoch, rank) and layout.

        The workers start reading when this is called. One epoch is read at a time: calling it again ends the last one.

        Args:
            epoch: number of the epoch, from 0. Starting at any epoch gives the batches one would arrive at.
            first_step: steps of the epoch already taken. They are passed over without decoding, so what follows is the
                rest of the same epoch (up to undecodable images among those passed over, which only show in decoding).

        Raises:
            ValueError: first_step is not within the epoch.
            NoUsableSamplesError: while iterating, when a worker finds no usable sample.
        """
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first_step is {first_step}, the epoch has {self.steps_per_epoch} steps")
        self._position.set(epoch, first_step)
        return itertools.islice(iter(self._loader), self.steps_per_epoch - first_step)


def build_train_loader(
    config: DataConfig,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    rank: int,
    world_size: int,
    pin_memory: bool,
    clock: StageClock | None = None,
) -> TrainLoader:
    """The loader of one rank. Ranks agree on steps and on who reads what without talking to each other.

    Args:
        config: the data flags, the same on every rank.
        preprocess: RGB PIL picture → [3, H, W] float tensor. Of open_clip's own transform for training the parts are used
            (see `training.data.pictures`), so that batches hold uint8.
        tokenizer: list of B texts → [B, L] integer tensor.
        rank: this rank, from 0.
        world_size: number of ranks.
        pin_memory: copy batches to page-locked memory, for a GPU.
        clock: measures the stages, in the workers.

    Raises:
        UserError: flags that contradict each other or the data.
    """
    source, layout, description = _open(config, world_size)
    buffer = config.shuffle_buffer if isinstance(source, ShardSource) else 0  # Rows are permuted already.
    pictures = make_pictures(preprocess, config.decode)
    dataset = BatchDataset(source, layout, rank, pictures, quick_tokenizer(tokenizer), buffer, config.needs_keys)
    if clock is not None:
        clock.watch(dataset)
    return TrainLoader(dataset, config.workers, pin_memory, description)


def _open(config: DataConfig, world_size: int) -> tuple[SampleSource, Layout, str]:
    check_flags(config)
    kind = resolve_dataset_type(config)
    if kind == "webdataset":
        return _open_shards(config, world_size)
    rows: CsvRows | SyntheticRows
    if kind == "csv":
        rows = read_csv(config)
    else:
        rows = SyntheticRows(
            config.train_num_samples or SYNTHETIC_STEPS * config.samples_per_step * world_size, config.seed
        )
    layout = _layout(config, world_size, len(rows))
    what = f"csv {config.train_data}" if kind == "csv" else "synthetic"
    return RowSource(rows, layout), layout, f"{what}: {len(rows):,} samples\n{_epoch_in_words(layout, len(rows))}"


def _open_shards(config: DataConfig, world_size: int) -> tuple[SampleSource, Layout, str]:
    sources = expand_sources(config.train_data or "")
    factors = parse_factors(config, len(sources))
    # With replacement neither sizes nor a total are needed, and counting could take long.
    sized = (
        find_sizes(sources) if not config.dataset_resampled else SizedShards(_unsized(sources), None, "not looked up")
    )
    layout = _layout(config, world_size, sized.total)
    order: ShardOrder
    if config.dataset_resampled:
        order = DrawnOrder(sized.shards, layout, factors)
        words = f"shards drawn with replacement, {layout.num_samples:,} samples an epoch in {layout.steps:,} steps"
        if config.train_data_upsampling_factors is not None:
            words += f", factors {config.train_data_upsampling_factors}"
    elif sized.exact:
        order = ExactOrder(sized.shards, layout)
        words = _epoch_in_words(layout, sized.total or 0)
    else:
        order = DealtOrder(sized.shards, layout)
        words = (
            f"an epoch is {layout.num_samples:,} samples in {layout.steps:,} steps from shards dealt to workers: some "
            "samples may come twice or not at all; python -m training.data.index makes epochs exact"
        )
    many = "" if len(sources) == 1 else f" of {len(sources)} sources"
    total = "unknown" if sized.total is None else f"{sized.total:,} (from {sized.origin})"
    return ShardSource(order), layout, f"webdataset: {len(sized.shards):,} shards{many}, samples: {total}\n{words}"


def _layout(config: DataConfig, world_size: int, total: int | None) -> Layout:
    steps = plan_steps(config, world_size, total)
    return Layout(steps, config.samples_per_step, world_size, max(config.workers, 1), config.seed)


def _epoch_in_words(layout: Layout, total: int) -> str:
    left = total - layout.num_samples
    rest = f"; {left:,} are left out, other ones each epoch" if left else ""
    return f"exact epochs: {layout.num_samples:,} samples in {layout.steps:,} steps, none twice{rest}"


def _unsized(sources: list[list[str]]) -> list[Shard]:
    return [Shard(url, index) for index, urls in enumerate(sources) for url in urls]


def _unchanged(batch: T) -> T:
    return batch


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)  # A worker per core: more threads each would only get in each other's way.
    # Batch systems signal every process of a job, and ^C every one of a terminal. What the signal means is for the
    # training process to decide, which still needs batches to finish its step.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # A handler would not see who sent the signal; with the signal blocked a waiting thread does.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent_only, daemon=True).start()


def _obey_parent_only() -> None:
    """Ends the worker at a SIGTERM from the training process, which is how one is shut down, and at no other."""
    parent = multiprocessing.parent_process()  # not os.getppid(), which may be a fork server
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (parent.pid if parent else os.getppid()):
        pass
    end_commands()
    os._exit(0)
