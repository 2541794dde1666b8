"""Who reads what: pure functions of (seed, epoch, rank, worker) that open no file.

A consumer is one worker of one rank. Steps of a rank go round its workers, so worker w delivers steps w, w + W, …;
how many that is does not depend on the data. Three orders say which samples a consumer draws them from:

- ExactOrder, sizes known: the samples of all shards in a permuted row, one range of the row for each consumer.
- DealtOrder, sizes unknown: permuted shards dealt to consumers; of a shared shard, every m-th sample.
- DrawnOrder: shards drawn with replacement.

An epoch that goes on under another layout (see segments) has orders of its own for the rest, made by `rest`.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from training.data.config import DataConfig
from training.data.runs import Runs
from training.data.seeds import Purpose, derive_seed
from training.data.shards import Shard
from training.errors import UserError

# A consumer whose own part yields nothing looks at this many other shards before it gives up.
SPARE_SHARDS = 64
# Runs of at most this many samples are picked out of their shard in one reading of it.
_SHORT_RUN = 1000


class Place(NamedTuple):
    """One consumer in one epoch."""

    epoch: int
    rank: int
    worker: int


class Pass(NamedTuple):
    """One time through a consumer's data.

    attempt: counts the times that the consumer had to start over to fill its quota. spare: 0 for its own samples, 1 for the
    others that it falls back on when its own yield none in this attempt.
    """

    attempt: int = 0
    spare: int = 0


@dataclass(frozen=True)
class Layout:
    """The numbers that divide an epoch, or what is left of one: the same on every rank.

    steps: batches of each rank. batch_size: samples of one rank's batch. workers: at least 1. segment: 0 for a whole epoch;
    each rest of it that goes on under another layout has the next number, so that its random numbers are new ones.
    """

    steps: int
    batch_size: int
    world_size: int
    workers: int
    seed: int
    segment: int = 0

    @property
    def num_samples(self) -> int:
        """Samples of these steps over all ranks."""
        return self.steps * self.batch_size * self.world_size

    def worker_steps(self, worker: int) -> int:
        """Batches that one worker delivers; over the workers of a rank they differ by at most 1."""
        return (self.steps - worker + self.workers - 1) // self.workers

    def sample_range(self, place: Place) -> tuple[int, int]:
        """The part [start, stop) of the num_samples that belongs to a consumer: whole batches."""
        base, extra = divmod(self.steps, self.workers)
        before = place.rank * self.steps + base * place.worker + min(place.worker, extra)
        return before * self.batch_size, (before + self.worker_steps(place.worker)) * self.batch_size

    def rng(self, purpose: Purpose, *parts: int) -> random.Random:
        """A generator for `purpose`, a function of the run's seed, the given parts and the segment."""
        return random.Random(self.derive(purpose, *parts))

    def derive(self, purpose: Purpose, *parts: int) -> int:
        """The seed of such a generator."""
        return derive_seed(purpose, self.seed, *parts, *([self.segment] if self.segment else []))


@dataclass(frozen=True)
class ShardSlice:
    """Samples start, start + step, … below stop (None: the end) of a shard, by position in the file.

    chosen: of those only the ones at these positions (which lie in the slice); None for all.
    """

    shard: Shard
    start: int = 0
    stop: int | None = None
    step: int = 1
    chosen: frozenset[int] | None = None

    def has(self, index: int) -> bool:
        """Whether the sample at a position is meant."""
        if index < self.start or (self.stop is not None and index >= self.stop) or (index - self.start) % self.step:
            return False
        return self.chosen is None or index in self.chosen

    def places(self) -> list[int]:
        """The positions meant, in order; for slices with a stop."""
        assert self.stop is not None
        return list(range(self.start, self.stop, self.step)) if self.chosen is None else sorted(self.chosen)

    def count(self) -> int | None:
        """How many positions are meant; None without a stop."""
        if self.stop is None:
            return None
        return len(range(self.start, self.stop, self.step)) if self.chosen is None else len(self.chosen)

    def only(self, positions: Sequence[int]) -> ShardSlice:
        """The slice of some of its positions, at least one, ascending."""
        return ShardSlice(self.shard, positions[0], positions[-1] + 1, chosen=frozenset(positions))

    def after(self, passed: int) -> ShardSlice:
        """The slice without its first positions, fewer than it has."""
        if self.chosen is None:
            return replace(self, start=self.start + passed * self.step)
        return self.only(self.places()[passed:])


class ShardOrder(Protocol):
    """What a consumer reads, in which order."""

    shards: Sequence[Shard]
    layout: Layout

    def slices(self, place: Place, attempt: int) -> Iterator[ShardSlice]:
        """What to read in an epoch. attempt counts the times the consumer had to start over to fill its quota."""
        ...

    def rest(self, layout: Layout, row: Runs) -> ShardOrder:
        """The order in which another layout reads what is left of an epoch: the positions in `row`, if it has any."""
        ...


def plan_steps(config: DataConfig, world_size: int, total: int | None) -> int:
    """Steps of an epoch: whole global batches in the samples asked for, or in those there are.

    Args:
        config: the data flags.
        world_size: number of ranks.
        total: samples in the data, None when unknown.

    Raises:
        UserError: the number of samples is neither given nor known, more are asked for than there are, or they do not
            fill one global batch.
    """
    wanted = config.train_num_samples
    if wanted is None:
        if total is None:
            raise UserError(
                f"--train-num-samples is missing and the sizes of the shards of --train-data {config.train_data} are "
                "unknown: give the samples of an epoch, or run python -m training.data.index on local shards"
            )
        wanted = total
    elif total is not None and wanted > total and not config.dataset_resampled:
        raise UserError(
            f"--train-num-samples {wanted} is more than the {total} samples of --train-data {config.train_data}: "
            "lower it, or leave it out to use them all"
        )
    global_batch = config.samples_per_step * world_size
    if wanted < global_batch:
        micro_batches = f" --accum-freq {config.accum_freq}" if config.accum_freq > 1 else ""
        raise UserError(
            f"--batch-size {config.batch_size}{micro_batches} on {world_size} ranks takes {global_batch} samples a step, "
            f"but an epoch has {wanted}: lower --batch-size or give more data"
        )
    return wanted // global_batch


class ExactOrder:
    """Every sample at most once in an epoch, over all ranks and workers; the sizes of all shards are known."""

    def __init__(self, shards: Sequence[Shard], layout: Layout, row: Runs | None = None) -> None:
        """shards: all with a size. row: positions of the epoch, at least layout.num_samples; None for all samples."""
        self.shards = shards
        self.layout = layout
        self.total = sum(shard.size or 0 for shard in shards)
        self.row = Runs.of(0, self.total) if row is None else row

    def slices(self, place: Place, attempt: int) -> Iterator[ShardSlice]:
        """The consumer's range of the permuted row; the same range, its parts in another order, on later attempts."""
        # The same in all segments of an epoch, which share its positions.
        rng = random.Random(derive_seed(Purpose.EPOCH_ORDER, self.layout.seed, place.epoch))
        order = list(self.shards)
        rng.shuffle(order)
        # The row is a ring entered anywhere: with few shards too, other samples are left over each epoch and other
        # ones meet in a worker.
        entry = rng.randrange(self.total)
        ends = list(itertools.accumulate(shard.size or 0 for shard in order))
        ring = [(entry + start, entry + stop) for start, stop in self.row.part(*self.layout.sample_range(place))]
        pieces = itertools.chain(
            _cut(ends, ((low, min(high, self.total)) for low, high in ring)),
            _cut(ends, ((max(low, self.total) - self.total, high - self.total) for low, high in ring)),
        )
        parts = [_slice(order[index], spans) for index, spans in _by_shard(pieces)]
        if attempt:
            self.layout.rng(Purpose.OWN_SHARDS, *place, attempt).shuffle(parts)
        return iter(parts)

    def rest(self, layout: Layout, row: Runs) -> ExactOrder:
        """The order of the positions in `row`, at least layout.num_samples of them."""
        return ExactOrder(self.shards, layout, row)


Span = tuple[int, int]


def _cut(ends: Sequence[int], spans: Iterable[Span]) -> Iterator[tuple[int, Span]]:
    """Spans [low, high) of the shards laid end to end as (index of a shard, span in it); ends are the cumulated sizes."""
    for low, high in spans:
        index = bisect_right(ends, low)
        while low < high:
            begin = ends[index - 1] if index else 0
            stop = min(high, ends[index])
            if stop > low:
                yield index, (low - begin, stop - begin)
            low = stop
            index += 1


def _by_shard(pieces: Iterable[tuple[int, Span]]) -> Iterator[tuple[int, list[Span]]]:
    """Spans to be read together: short ones that follow each other in a shard, and each long one by itself."""
    index, together = -1, list[Span]()
    for shard, span in pieces:
        short = span[1] - span[0] <= _SHORT_RUN
        if together and (shard != index or not short or span[0] < together[-1][1]):
            yield index, together
            together = []
        if short:
            index = shard
            together.append(span)
        else:
            yield shard, [span]
    if together:
        yield index, together


def _slice(shard: Shard, spans: Sequence[Span]) -> ShardSlice:
    (start, stop), *others = spans
    if not others:
        return ShardSlice(shard, start, stop)
    return ShardSlice(shard, start, spans[-1][1], chosen=frozenset(itertools.chain(*(range(*span) for span in spans))))


class DealtOrder:
    """Shards of unknown size, each read by one consumer, or shared sample by sample when there are too few."""

    def __init__(self, shards: Sequence[Shard], layout: Layout) -> None:
        self.shards = shards
        self.layout = layout

    def slices(self, place: Place, attempt: int) -> Iterator[ShardSlice]:
        """The consumer's shards of this epoch; the same ones in another order on later attempts."""
        order = list(self.shards)
        self.layout.rng(Purpose.EPOCH_ORDER, place.epoch).shuffle(order)
        consumers = self.layout.world_size * self.layout.workers
        me = place.rank * self.layout.workers + place.worker
        if len(order) >= consumers:
            mine = [ShardSlice(shard) for shard in order[me::consumers]]
        else:
            number = me % len(order)
            sharers = len(range(number, consumers, len(order)))
            mine = [ShardSlice(order[number], start=me // len(order), step=sharers)]
        if attempt:
            self.layout.rng(Purpose.OWN_SHARDS, *place, attempt).shuffle(mine)
        return iter(mine)

    def rest(self, layout: Layout, row: Runs) -> DealtOrder:
        """All shards dealt anew: without sizes nobody knows which samples are left."""
        return DealtOrder(self.shards, layout)


class DrawnOrder:
    """Shards drawn with replacement, independently by every consumer."""

    def __init__(self, shards: Sequence[Shard], layout: Layout, factors: Sequence[float]) -> None:
        """factors: one per "::" source; a shard is drawn in proportion to the factor of its source."""
        self.shards = shards
        self.layout = layout
        self._factors = factors
        self._cumulated = list(itertools.accumulate(factors[shard.source] for shard in shards))

    def slices(self, place: Place, attempt: int) -> Iterator[ShardSlice]:
        """As many draws that, were only one shard sound, it would hardly be missed; further attempts draw on."""
        rng = self.layout.rng(Purpose.DRAWN_SHARDS, *place, attempt)
        for _ in range(20 + 2 * len(self.shards)):
            yield ShardSlice(rng.choices(self.shards, cum_weights=self._cumulated)[0])

    def rest(self, layout: Layout, row: Runs) -> DrawnOrder:
        """Further draws."""
        return DrawnOrder(self.shards, layout, self._factors)


def spare_slices(order: ShardOrder, place: Place, attempt: int) -> Iterator[ShardSlice]:
    """Whole shards from anywhere in the data, for a consumer whose own part yields no sample."""
    rng = order.layout.rng(Purpose.SPARE_SHARDS, *place, attempt)
    for shard in rng.sample(list(order.shards), min(SPARE_SHARDS, len(order.shards))):
        # With a stop, where the size is known, the number of slots does not depend on what the shard holds.
        yield ShardSlice(shard, stop=shard.size)
