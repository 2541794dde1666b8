"""A whole training set as evaluation sees it: in parts that are opened one at a time, so that memory does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from evaluation.collectives import all_reduce_sum
from evaluation.csv_pairs import CsvPairs
from evaluation.datasets import PairDataset, Tokenizer, Transform, expand_shards
from evaluation.errors import NoPairsError, UserError
from evaluation.sample_json import parse_key

Sample = dict[str, Any]
Batch = dict[str, Any]

# Part of the data set, place within it.
Spot = tuple[int, int]


class Pool:
    """Every pair of a data set, at a part (a shard, or a whole csv file) and a place within it.

    Args:
        parts: what opens each part.
        lengths: pairs of each part.
        needs_keys: the samples' integer keys are wanted: `{"key": 17}` in their json, row numbers of a csv file.

    Attributes:
        total: n, the number of pairs.
    """

    def __init__(self, parts: Sequence[Callable[[], PairDataset]], lengths: Sequence[int], needs_keys: bool) -> None:
        self.parts = parts
        self.lengths = list(lengths)
        self.offsets = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        self.total = self.offsets[-1]
        self.needs_keys = needs_keys

    def sample(self, spot: Spot, opened: PairDataset) -> Sample | None:
        """`image`, `text`, `index` (global) and `key` of a sample; None for one whose image, caption or key is broken.

        A training run leaves such samples out too, and those with an empty caption.
        """
        part, place = spot
        try:
            if not opened.caption(place):
                return None
            sample = opened[place]
            sample["key"] = self._key(opened, place) if self.needs_keys else 0
        except UserError:
            return None
        sample["index"] = self.offsets[part] + place
        return sample

    @staticmethod
    def _key(opened: PairDataset, place: int) -> int:
        if isinstance(opened, CsvPairs):
            return place
        facts = opened.index.members[place].get("json")
        key = None if facts is None else parse_key(opened.index.read(facts))
        if key is None:
            raise UserError(f"{opened.index.name(place)} has no integer key")
        return key


class _Opener:
    """Opens one shard, or a csv file; a class, so that worker processes can be sent it."""

    def __init__(self, kind: type[PairDataset], path: str, transform: Transform, tokenizer: Tokenizer, **options: str):
        self.kind, self.path, self.transform, self.tokenizer, self.options = kind, path, transform, tokenizer, options

    def __call__(self) -> PairDataset:
        return self.kind(self.path, self.transform, self.tokenizer, **self.options)  # type: ignore[arg-type]


def open_pool(
    data: str,
    transform: Transform,
    tokenizer: Tokenizer,
    *,
    needs_keys: bool,
    csv_columns: dict[str, str] | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Pool:
    """Find out what a data set holds. All ranks call it together; each reads the headers of a share of the shards.

    Args:
        data: shards (braces, folders, `::`), or a csv file.
        transform, tokenizer: as in PairDataset.
        csv_columns: image_key, caption_key and separator of a csv file.
        workers: processes that read headers, on each rank.

    Raises:
        UserError: a shard or the file is missing or damaged, or there are no pairs.
    """
    if data.lower().endswith((".csv", ".tsv")):
        opener = _Opener(CsvPairs, data, transform, tokenizer, **(csv_columns or {}))
        return Pool([opener], [opener().total], needs_keys)
    openers = [_Opener(PairDataset, shard, transform, tokenizer) for shard in expand_shards(data)]
    lengths = torch.zeros(len(openers), dtype=torch.int64)
    own = range(rank, len(openers), world_size)
    for part, length in DataLoader(_Lengths(openers, own), batch_size=None, num_workers=min(workers, len(own))):
        lengths[part] = length
    pool = Pool(openers, all_reduce_sum(lengths, world_size).tolist(), needs_keys)
    if not pool.total:
        raise UserError(f"--data {data}: no sample has both an image and a caption; check the shards.")
    return pool


class _Lengths(Dataset[tuple[int, int]]):
    """The number of pairs of some parts."""

    def __init__(self, openers: Sequence[_Opener], parts: Sequence[int]) -> None:
        self.openers, self.parts = openers, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, place: int) -> tuple[int, int]:
        part = self.parts[place]
        try:
            return part, self.openers[part]().total
        except NoPairsError:
            return part, 0


class Spots(Dataset[Sample | None]):
    """Samples at given spots."""

    def __init__(self, pool: Pool, spots: Sequence[Spot]) -> None:
        self.pool, self.spots = pool, spots
        self._open = lru_cache(maxsize=2)(_OpenPart(pool))

    def __len__(self) -> int:
        return len(self.spots)

    def __getitem__(self, place: int) -> Sample | None:
        return self.pool.sample(self.spots[place], self._open(self.spots[place][0]))

    def __getstate__(self) -> dict[str, Any]:
        return {"pool": self.pool, "spots": self.spots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _OpenPart:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def __call__(self, part: int) -> PairDataset:
        return self.pool.parts[part]()


class Everything(IterableDataset[Sample | None]):
    """All samples of the pool, dealt out over ranks and loader workers: by parts if there are enough of them."""

    def __init__(self, pool: Pool, rank: int, world_size: int) -> None:
        self.pool, self.rank, self.world_size = pool, rank, world_size

    def __iter__(self) -> Iterator[Sample | None]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        slots, slot = self.world_size * workers, self.rank * workers + number
        parts = [part for part, length in enumerate(self.pool.lengths) if length]
        by_parts = len(parts) >= slots
        for part in parts[slot::slots] if by_parts else parts:
            opened = self.pool.parts[part]()
            for place in range(opened.total) if by_parts else range(slot, opened.total, slots):
                yield self.pool.sample((part, place), opened)


def batches(dataset: Dataset[Sample | None], batch_size: int, workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Batches of `image`, `text`, `index`, `key` without the broken samples, whose number is `left_out`.

    A batch of nothing but broken samples has `left_out` alone.
    """
    return DataLoader(
        dataset, batch_size=batch_size, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory, drop_last=False
    )


def _collate(samples: list[Sample | None]) -> Batch:
    whole = [sample for sample in samples if sample is not None]
    batch: Batch = default_collate(whole) if whole else {}
    return {**batch, "left_out": torch.tensor(len(samples) - len(whole))}


def draw_spots(pool: Pool, number: int, seed: int) -> list[Spot]:
    """Different spots at random, the same on every rank for a seed; in random order, so that any part of them is a sample."""
    generator = torch.Generator().manual_seed(seed)
    chosen: Tensor = torch.randperm(pool.total, generator=generator)[: min(number, pool.total)]
    parts = torch.searchsorted(torch.tensor(pool.offsets), chosen, right=True) - 1
    places = chosen - torch.tensor(pool.offsets)[parts]
    return list(zip(parts.tolist(), places.tolist()))
