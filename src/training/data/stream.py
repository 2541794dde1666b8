"""From raw samples to batches: what runs in a loader's worker process."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from training.data.config import Batch
from training.data.pictures import Pictures
from training.data.plan import Layout, Pass, Place
from training.data.progress import Delivery, Progress
from training.data.runs import Runs
from training.data.samples import BrokenSampleError, RawSample, Tally, read_labels
from training.data.seeds import Purpose, seeded_augmentation
from training.data.shuffle import pass_over, shuffled

Tokenizer = Callable[[list[str]], torch.Tensor]


class NoUsableSamplesError(RuntimeError):
    """A consumer went through its data, and through others, without one whole sample; the message names the data."""


class SampleSource(Protocol):
    """Where the samples of a consumer come from; see ShardSource and RowSource."""

    def rest(self, layout: Layout, row: Runs) -> SampleSource: ...

    def count(self, place: Place, which: Pass) -> int | None: ...

    def slots(self, place: Place, which: Pass, first: int = 0) -> Iterator[RawSample]: ...

    def chosen(self, place: Place, which: Pass, numbers: np.ndarray) -> Iterator[RawSample]: ...

    def names(self, place: Place) -> str: ...


@dataclass(frozen=True)
class Beginning:
    """From where on a rank delivers an epoch.

    epoch: its number. source, layout: of the segment that is being delivered. step: steps of the segment that are over.
    progress: where each worker of the rank stands.
    """

    epoch: int
    source: SampleSource
    layout: Layout
    step: int
    progress: Sequence[Progress]


class Position:
    """The epoch that is next, told to worker processes that are already running."""

    def __init__(self) -> None:
        self._shared = multiprocessing.Value("q", 0)

    def set(self, epoch: int) -> None:
        """To be called before the workers are asked to start over."""
        self._shared.value = epoch

    def get(self) -> int:
        """The number of the epoch."""
        return self._shared.value


class Slots:
    """The slots of a consumer in the order they leave its shuffle buffer, over and over: broken samples are made up for by
    seeing good ones again.
    """

    def __init__(
        self,
        source: SampleSource,
        layout: Layout,
        place: Place,
        shuffle_buffer: int,
        tally: Tally,
        progress: Progress,
    ) -> None:
        """tally: where the good ones are counted, by whoever takes the slots. progress: where to go on."""
        self._source = source
        self._layout = layout
        self._place = place
        self._shuffle_buffer = shuffle_buffer
        self._tally = tally
        self._attempt, self._spare, self._taken = progress.attempt, progress.spare, progress.taken
        # An attempt that has given a good sample before this process began has one more than its tally shows.
        self._good_before = tally.good - progress.good

    @property
    def progress(self) -> Progress:
        """Where the consumer stands, between two slots."""
        return Progress(self._attempt, self._spare, self._taken, int(self._has_good()))

    def __iter__(self) -> Iterator[RawSample]:
        """Endless.

        Raises:
            NoUsableSamplesError: neither the consumer's own data nor others had a good sample.
        """
        while True:
            for raw in self._pass():
                self._taken += 1
                yield raw
            if self._has_good():
                self._attempt, self._spare, self._taken = self._attempt + 1, 0, 0
                self._good_before = self._tally.good
            elif not self._spare:
                self._spare, self._taken = 1, 0
            else:
                place = self._place
                raise NoUsableSamplesError(
                    f"no usable sample in the data of rank {place.rank}, worker {place.worker}, epoch {place.epoch}, "
                    f"nor in others tried: {self._source.names(place)}; the last problem: {self._tally.last_skipped}"
                )

    def _has_good(self) -> bool:
        return self._tally.good > self._good_before

    def _pass(self) -> Iterator[RawSample]:
        """What is still to come of the present pass."""
        which, taken, size = Pass(self._attempt, self._spare), self._taken, self._shuffle_buffer
        rng = self._layout.rng(Purpose.SHUFFLE_BUFFER, *self._place, self._attempt)
        if not taken:
            return shuffled(self._source.slots(self._place, which), size, rng)
        count = self._source.count(self._place, which)
        if count is None:
            # Only reading shows how many there are.
            slots = shuffled(self._source.slots(self._place, which), size, rng)
            for _ in itertools.islice(slots, taken):
                pass
            return slots
        held, read = pass_over(count, taken, size, rng)
        numbers = np.sort(np.array(held, dtype=np.int64))
        found = dict(zip(numbers.tolist(), self._source.chosen(self._place, which, numbers)))
        return shuffled(self._source.slots(self._place, which, read), size, rng, [found.pop(slot) for slot in held])


def collate(images: list[torch.Tensor], text: torch.Tensor, keys: list[int | None]) -> Batch:
    """Puts a batch together.

    Args:
        images: B of [H, W, 3] uint8, or of [3, H, W] float32.
        text: [B, L] integers.
        keys: B of them; the batch has none if any is missing.
    """
    # In a worker straight into memory shared with the training process, where torch.stack would add a copy.
    image = default_collate(images)
    return Batch(
        # Each picture lies in memory as it came, channels last: turning it round is left to the device.
        image=image.permute(0, 3, 1, 2) if image.dtype == torch.uint8 else image,
        text=torch.as_tensor(text).long(),
        keys=None if None in keys else torch.tensor(keys, dtype=torch.int64),
    )


class BatchDataset(IterableDataset):
    """A rank's whole batches; an iteration is the part of one epoch that this worker process delivers."""

    def __init__(
        self,
        source: SampleSource,
        layout: Layout,
        rank: int,
        pictures: Pictures,
        tokenizer: Tokenizer,
        shuffle_buffer: int,
        needs_keys: bool,
    ) -> None:
        """tokenizer: list of B texts → [B, L] integers."""
        super().__init__()
        self.source = source
        self.layout = layout
        self.rank = rank
        # The stages of a batch. Measuring them means putting a measured function in the place of each.
        self.decode = pictures.decode
        self.transform = pictures.transform
        self.tokenizer = tokenizer
        self.collate = collate
        self.shuffle_buffer = shuffle_buffer
        self.needs_keys = needs_keys
        self.position = Position()
        # The one epoch that does not begin at its beginning; to be set before there are worker processes.
        self.resumed: Beginning | None = None
        self.tally = Tally()

    def beginning(self, epoch: int) -> Beginning:
        """From where on an epoch is delivered."""
        if self.resumed is not None and self.resumed.epoch == epoch:
            return self.resumed
        return Beginning(epoch, self.source, self.layout, 0, [Progress()] * self.layout.workers)

    def __iter__(self) -> Iterator[Delivery]:
        """The batches of this process in the epoch set as position.

        Raises:
            NoUsableSamplesError: the quota cannot be filled.
        """
        begin = self.beginning(self.position.get())
        info = get_worker_info()
        process = 0 if info is None else info.id
        # Processes are asked in turn, from 0 on: the worker whose turn the first step is takes the place of process 0.
        worker = (process + begin.step) % begin.layout.workers
        done = (begin.step - worker + begin.layout.workers - 1) // begin.layout.workers
        return self._batches(begin, worker, max(done, 0))

    def _batches(self, begin: Beginning, worker: int, done: int) -> Iterator[Delivery]:
        layout, place = begin.layout, Place(begin.epoch, self.rank, worker)
        slots = Slots(begin.source, layout, place, self.shuffle_buffer, self.tally, begin.progress[worker])
        samples = iter(slots)
        for index in range(done, layout.worker_steps(worker)):
            # Seeded for each batch and not only for each epoch: a batch can be had without those before it.
            with seeded_augmentation(layout.derive(Purpose.AUGMENTATION, *place, index)):
                batch = self.collect(samples)
            yield Delivery(batch, slots.progress, self.tally.drain())

    def collect(self, samples: Iterator[RawSample]) -> Batch:
        """A batch of the next usable samples."""
        images: list[torch.Tensor] = []
        captions: list[str] = []
        keys: list[int | None] = []
        while len(images) < self.layout.batch_size:
            raw = next(samples)
            try:
                caption, key = read_labels(raw, self.needs_keys)
                decoded = self.decode(raw.image)
            except BrokenSampleError as broken:
                self.tally.skip(str(broken), raw)
                continue
            # Not guarded: the picture is whole, so an error in here is a mistake in the transforms.
            images.append(self.transform(decoded))
            captions.append(caption)
            keys.append(key)
            self.tally.good += 1
        return self.collate(images, self.tokenizer(captions), keys)
