"""Puts a rank's loader together from the flags."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training.data.config import Batch, DataConfig, check_flags, parse_factors, resolve_dataset_type
from training.data.pictures import Preprocess, make_pictures
from training.data.plan import DealtOrder, DrawnOrder, ExactOrder, Layout, ShardOrder, plan_steps
from training.data.preflight import first_shards_hold
from training.data.progress import Delivery, History, ProblemLog, Progress
from training.data.samples import Counts
from training.data.segments import DEALT, DRAWN, EXACT, ROWS, Course, DataIdentity, Segment, begin, resume
from training.data.shards import Shard, expand_sources
from training.data.sizes import SizedShards, find_sizes
from training.data.sources import ShardSource
from training.data.stages import StageClock
from training.data.stream import BatchDataset, Beginning, SampleSource, Tokenizer
from training.data.tables import SYNTHETIC_STEPS, CsvRows, RowSource, SyntheticRows, read_csv
from training.data.timeout import end_process, patient
from training.data.tokens import quick_tokenizer
from training.data.workers import heed_parent_only

T = TypeVar("T")
PREFETCHED_BATCHES = 2
# How many times as long the first batch of an epoch that goes on may take.
RESUMED_PATIENCE = 16


class Patience(NamedTuple):
    """seconds: how long to wait for a batch. explain: says then what the data hold."""

    seconds: float
    explain: Callable[[], str]


class TrainLoader:
    """The training batches of one rank, epoch by epoch.

    steps_per_epoch: batches of an epoch, the same on every rank.
    num_samples: samples of an epoch over all ranks (steps_per_epoch · batch_size · world_size).
    data_description: one or two lines for the run's plan: kind, shards, samples, and how exact an epoch is.
    give_up: ends the process where that is the only way to stop waiting for data (see `patient`).
    """

    def __init__(
        self,
        dataset: BatchDataset,
        workers: int,
        pin_memory: bool,
        data_description: str,
        samples: int,
        identity: DataIdentity,
        patience: Patience | None = None,
    ) -> None:
        """workers: processes, 0 for none. samples: those an epoch is meant to have. identity: of the data.

        patience: how long to wait for a batch; None: for ever.
        """
        self.steps_per_epoch: int = dataset.layout.steps
        self.num_samples: int = dataset.layout.num_samples
        self.data_description = data_description
        self.give_up: Callable[[str], object] = end_process
        self._dataset = dataset
        self._workers = workers
        self._pin_memory = pin_memory
        self._identity = identity
        self._patience = patience
        self._whole = Segment.whole(dataset.layout, samples, dataset.shuffle_buffer)
        self._resumed: Course | None = None
        self._course = begin(0, self._whole)
        self._history = History(0, dataset.beginning(0).progress)
        self._problems = ProblemLog()
        self._loader = self._open_loader()

    def resume_at(self, state: dict[str, Any] | None, epoch: int) -> int:
        """Decides where an epoch goes on; epoch(epoch) begins there from now on. Every rank calls it with the same state.

        With the data, the seed and the layout of the checkpoint the rest of the epoch is, bit for bit, what it would have
        been. Under another layout (ranks, workers, batch, shuffle buffer) no sample of the epoch is lost or repeated where
        the sizes of shards are known, but for less than a global batch at its end. Otherwise, and if the data is not the same,
        the epoch goes on at about the same share of its steps, after a warning in the log.

        Args:
            state: what `state` returned; None, or the state of another epoch, begins the epoch at its beginning.
            epoch: number of the epoch, from 0.

        Returns:
            The first step that is still to come, of the present steps_per_epoch; steps_per_epoch itself if none is.
        """
        course = resume(state, epoch, self._whole, self._identity)
        # Large batches may leave as many steps as an epoch has, and yet fewer samples.
        goes_on = course.step > 0 or course.segment.number > 0
        before, self._resumed = self._resumed, course if goes_on else None
        self._dataset.resumed = None if self._resumed is None else self._beginning(course)
        if before is not None or self._resumed is not None:
            # Worker processes that are running know nothing of the change.
            self._loader = self._open_loader()
        self._look_at(self._course_of(epoch))
        return course.step

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch: a function of (seed, epoch, rank) and layout, from its first step or from resume_at's on.

        The workers start reading when this is called. One epoch is read at a time: calling it again ends the last one.

        Args:
            epoch: number of the epoch, from 0. Starting at any epoch gives the batches one would arrive at.

        Raises:
            NoUsableSamplesError: while iterating, when a worker finds no usable sample.
        """
        course = self._course_of(epoch)
        self._look_at(course)
        self._dataset.position.set(epoch)
        deliveries: Iterator[Delivery] = iter(self._loader)
        if self._patience is not None:
            deliveries = patient(
                deliveries,
                self._patience.seconds,
                self._patience.explain,
                self._workers,
                self.give_up,
                # Shards of unknown size are read through up to the place where the epoch goes on.
                first=self._patience.seconds * (RESUMED_PATIENCE if course.step else 1),
            )
        deliveries = itertools.islice(deliveries, self.steps_per_epoch - course.step)
        return self._unpacked(deliveries, course, self._history)

    def place(self, step: int) -> Tensor:
        """Where this rank's consumers stand after `step` steps of the present epoch, for `state`.

        Args:
            step: of the present epoch, counted from its beginning: one of the last that were handed out.

        Returns:
            [workers, 4] int64, a Progress for each worker; at least one, as without worker processes.

        Raises:
            ValueError: step was not handed out yet, or too long ago.
        """
        return self._history.places(step)

    def state(self, places: Tensor, step: int) -> dict[str, Any]:
        """The checkpoint's entry after `step` steps of the present epoch, the same on every rank.

        Args:
            places: [world_size, workers, 4] int64, what place(step) is on each rank.

        Returns:
            Integers, texts, lists and int64 tensors.

        Raises:
            ValueError: places has another shape.
        """
        return self._course.entry(self._identity, places, step)

    def counts(self, step: int) -> Counts:
        """What this rank counted in the present epoch, since its beginning or resume_at's step, up to `step` steps.

        Raises:
            ValueError: step was not handed out yet, or too long ago.
        """
        return self._history.counts(step)

    def totals(self, step: int) -> tuple[int, int]:
        """How many of the samples that `counts` counts were good, and how many left out.

        Raises:
            ValueError: step was not handed out yet, or too long ago.
        """
        return self._history.totals(step)

    def _course_of(self, epoch: int) -> Course:
        if self._resumed is not None and self._resumed.epoch == epoch:
            return self._resumed
        return begin(epoch, self._whole)

    def _look_at(self, course: Course) -> None:
        self._course = course
        self._history = History(course.step, self._dataset.beginning(course.epoch).progress)

    def _beginning(self, course: Course) -> Beginning:
        progress = [Progress(*numbers) for numbers in course.places[self._dataset.rank].tolist()]
        source, layout = self._dataset.source, self._dataset.layout
        if course.segment.number > 0:
            layout = course.segment.layout(layout.seed)
            source = source.rest(layout, course.row)
        return Beginning(course.epoch, source, layout, course.step - course.segment.first_step, progress)

    def _unpacked(self, deliveries: Iterator[Delivery], course: Course, history: History) -> Iterator[Batch]:
        for step, delivery in enumerate(deliveries, start=course.step - course.segment.first_step):
            history.add(step % course.segment.workers, delivery)
            self._problems.add(delivery.counts)
            yield delivery.batch

    def _open_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._dataset,
            batch_size=None,  # The dataset yields whole batches.
            collate_fn=_unchanged,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            persistent_workers=self._workers > 0,
            prefetch_factor=PREFETCHED_BATCHES if self._workers > 0 else None,
            timeout=self._patience.seconds if self._patience is not None and self._workers > 0 else 0,
            worker_init_fn=heed_parent_only,
            # It draws a seed for each epoch, unused here, that must not come out of the training process's generator.
            generator=torch.Generator(),
        )


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
    data = _open(config, world_size)
    # Rows are permuted already.
    buffer = 0 if data.identity.order == ROWS else config.shuffle_buffer
    pictures = make_pictures(preprocess, config.decode)
    tokenize = quick_tokenizer(tokenizer)
    dataset = BatchDataset(data.source, data.layout, rank, pictures, tokenize, buffer, config.needs_keys)
    if clock is not None:
        clock.watch(dataset)
    patience = Patience(config.data_timeout, lambda: first_shards_hold(config)) if config.data_timeout else None
    return TrainLoader(dataset, config.workers, pin_memory, data.description, data.samples, data.identity, patience)


@dataclass(frozen=True)
class _OpenData:
    """source, layout: what is read, and how it is divided. samples: those an epoch is meant to have."""

    source: SampleSource
    layout: Layout
    samples: int
    identity: DataIdentity
    description: str


def _open(config: DataConfig, world_size: int) -> _OpenData:
    check_flags(config)
    kind = resolve_dataset_type(config)
    if kind == "webdataset":
        return _open_shards(config, world_size)
    rows: CsvRows | SyntheticRows
    if kind == "csv":
        rows = read_csv(config)
        facts = [os.path.basename(rows.path), len(rows), rows.captions.num_bytes]
        what = f"csv {config.train_data}"
    else:
        rows = SyntheticRows(
            config.train_num_samples or SYNTHETIC_STEPS * config.samples_per_step * world_size, config.seed
        )
        facts = [len(rows)]
        what = "synthetic"
    layout = _layout(config, world_size, len(rows))
    return _OpenData(
        RowSource(rows, layout),
        layout,
        config.train_num_samples or len(rows),
        DataIdentity(ROWS, config.seed, _fingerprint([kind, *facts])),
        f"{what}: {len(rows):,} samples\n{_epoch_in_words(layout, len(rows))}",
    )


def _open_shards(config: DataConfig, world_size: int) -> _OpenData:
    sources = expand_sources(config.train_data or "")
    factors = parse_factors(config, len(sources))
    # With replacement neither sizes nor a total are needed, and counting could take long.
    sized = (
        find_sizes(sources) if not config.dataset_resampled else SizedShards(_unsized(sources), None, "not looked up")
    )
    layout = _layout(config, world_size, sized.total)
    kind, order, words = _order(config, sized, layout, factors)
    facts = [(shard.url.rsplit("/", 1)[-1], shard.source, shard.size) for shard in sized.shards]
    many = "" if len(sources) == 1 else f" of {len(sources)} sources"
    total = "unknown" if sized.total is None else f"{sized.total:,} (from {sized.origin})"
    return _OpenData(
        ShardSource(order),
        layout,
        config.train_num_samples or sized.total or layout.num_samples,
        DataIdentity(kind, config.seed, _fingerprint([factors, facts])),
        f"webdataset: {len(sized.shards):,} shards{many}, samples: {total}\n{words}",
    )


def _order(config: DataConfig, sized: SizedShards, layout: Layout, factors: list[float]) -> tuple[str, ShardOrder, str]:
    """Which kind of order shards are read in, the order, and what it means in words."""
    if config.dataset_resampled:
        words = f"shards drawn with replacement, {layout.num_samples:,} samples an epoch in {layout.steps:,} steps"
        if config.train_data_upsampling_factors is not None:
            words += f", factors {config.train_data_upsampling_factors}"
        return DRAWN, DrawnOrder(sized.shards, layout, factors), words
    if sized.exact:
        return EXACT, ExactOrder(sized.shards, layout), _epoch_in_words(layout, sized.total or 0)
    words = (
        f"an epoch is {layout.num_samples:,} samples in {layout.steps:,} steps from shards dealt to workers: some "
        "samples may come twice or not at all; python -m training.data.index makes epochs exact"
    )
    return DEALT, DealtOrder(sized.shards, layout), words


def _fingerprint(facts: list[Any]) -> str:
    """A text that is the same for the same facts."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()


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
