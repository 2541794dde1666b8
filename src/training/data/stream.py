"""From raw samples to batches: what runs in a loader's worker process."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from training.data.config import Batch
from training.data.pictures import Pictures
from training.data.plan import Layout, Place
from training.data.samples import BrokenSampleError, RawSample, Tally, read_labels
from training.data.seeds import Purpose, derive_seed, seeded_augmentation

T = TypeVar("T")
Tokenizer = Callable[[list[str]], torch.Tensor]
# Samples in the shuffle buffer before the first one leaves it; it grows to its full size from there.
FIRST_FILL = 1000


class NoUsableSamplesError(RuntimeError):
    """A consumer went through its data, and through others, without one whole sample; the message names the data."""


class SampleSource(Protocol):
    """Where the samples of a consumer come from; see ShardSource and RowSource."""

    def samples(self, place: Place, attempt: int, tally: Tally) -> Iterator[RawSample]: ...

    def spares(self, place: Place, attempt: int, tally: Tally) -> Iterator[RawSample]: ...

    def names(self, place: Place) -> str: ...


class Position:
    """Where the next epoch starts, told to worker processes that are already running."""

    def __init__(self) -> None:
        self._shared = multiprocessing.Array("q", [0, 0])

    def set(self, epoch: int, first_step: int) -> None:
        """To be called before the workers are asked to start over."""
        with self._shared.get_lock():
            self._shared[:] = [epoch, first_step]

    def get(self) -> tuple[int, int]:
        """(epoch, first_step)"""
        with self._shared.get_lock():
            epoch, first_step = self._shared[:]
        return epoch, first_step


def shuffled(samples: Iterable[T], size: int, rng: random.Random) -> Iterator[T]:
    """Every sample once, in an order shuffled within a buffer of `size`; the order itself when size is below 2."""
    incoming = iter(samples)
    buffer: list[T] = []
    fill = min(size, FIRST_FILL)
    for sample in incoming:
        buffer.append(sample)
        if len(buffer) < fill:
            continue
        yield _take(buffer, rng)
        # Two come in for one that leaves until the buffer is full, so that its filling delays no batch.
        if len(buffer) < size - 1:
            buffer.extend(_next(incoming))
    while buffer:
        yield _take(buffer, rng)


def _take(buffer: list[T], rng: random.Random) -> T:
    # random() is several times as fast as randrange(), and this runs once a sample.
    index = int(rng.random() * len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def _next(incoming: Iterator[T]) -> Iterator[T]:
    for sample in incoming:
        yield sample
        return


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
        self.tally = Tally()

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this process, from the position on.

        Raises:
            NoUsableSamplesError: the quota cannot be filled.
        """
        epoch, first_step = self.position.get()
        info = get_worker_info()
        process = 0 if info is None else info.id
        # Processes are asked in turn, from 0 on: the worker whose turn the first step is takes the place of process 0.
        place = Place(epoch, self.rank, (process + first_step) % self.layout.workers)
        done = (first_step - place.worker + self.layout.workers - 1) // self.layout.workers
        return self._batches(place, max(done, 0))

    def _batches(self, place: Place, done: int) -> Iterator[Batch]:
        samples = self._endless(place)
        for index in range(self.layout.worker_steps(place.worker)):
            if index < done:
                self._pass_over(samples)
                continue
            # Seeded for each batch and not only for each epoch: a batch can be had without those before it.
            with seeded_augmentation(derive_seed(Purpose.AUGMENTATION, self.layout.seed, *place, index)):
                batch = self.collect(samples)
            yield batch

    def _endless(self, place: Place) -> Iterator[RawSample]:
        """A consumer's samples, over and over: broken ones are made up for by seeing good ones again."""
        attempt = 0
        while True:
            good = self.tally.good
            for read in (self.source.samples, self.source.spares):
                rng = self.layout.rng(Purpose.SHUFFLE_BUFFER, *place, attempt)
                yield from shuffled(read(place, attempt, self.tally), self.shuffle_buffer, rng)
                if self.tally.good > good:
                    break
            else:
                raise NoUsableSamplesError(
                    f"no usable sample in the data of rank {place.rank}, worker {place.worker}, epoch {place.epoch}, "
                    f"nor in others tried: {self.source.names(place)}; the last problem: {self.tally.last_skipped}"
                )
            attempt += 1

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

    def _pass_over(self, samples: Iterator[RawSample]) -> None:
        """Passes over a batch's samples without decoding them, leaving out those that a batch would leave out."""
        passed = 0
        while passed < self.layout.batch_size:
            raw = next(samples)
            try:
                read_labels(raw, self.needs_keys)
            except BrokenSampleError as broken:
                self.tally.skip(str(broken), raw)
                continue
            passed += 1
            self.tally.good += 1
