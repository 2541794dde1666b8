"""What a loader is asked for, what it delivers, and the checks that need no data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from training.errors import UserError

DECODING = ("fast", "exact")
DATASET_TYPES = ("webdataset", "csv", "synthetic", "auto")
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
TABLE_ENDINGS = (".csv", ".tsv")


class Batch(NamedTuple):
    """One rank's batch.

    image: [B, 3, H, W]. uint8 in channels-last order, not yet normalised, where `training.data.pictures` has taken over the
        ends of the transform; float32, as the transform leaves it, for any other. `training.pixels` takes both.
    text: [B, L] int64 token ids.
    keys: [B] int64, each sample's integer key, or None when a sample of the batch has none.
    """

    image: torch.Tensor
    text: torch.Tensor
    keys: torch.Tensor | None


@dataclass
class DataConfig:
    """The data flags of the command line.

    train_data: shards (a pattern with {000..999} braces, a glob, a folder; several joined by "::") or a csv file.
    dataset_type: "webdataset", "csv", "synthetic", or "auto" (by the ending of train_data).
    train_num_samples: samples of an epoch over all ranks; None takes them from the data where the data knows.
    dataset_resampled: draw shards with replacement instead of going through all of them.
    train_data_upsampling_factors: one factor per "::" source, such as "1::2::0.5"; needs dataset_resampled.
    workers: loader processes of a rank; 0 loads in the training process.
    batch_size, accum_freq: samples of one rank's micro-batch; micro-batches of its batch.
    shuffle_buffer: samples each worker holds, undecoded, to shuffle among.
    needs_keys: the objective keeps state per sample, so a sample without an integer key is unusable.
    data_size: number of integer keys that such an objective has places for, None for any.
    data_timeout: seconds to wait for a batch, 0 for ever.
    decode: "fast" or "exact", how pictures are decoded and resized (see `training.data.pictures`).
    """

    train_data: str | None
    dataset_type: str = "auto"
    train_num_samples: int | None = None
    dataset_resampled: bool = False
    train_data_upsampling_factors: str | None = None
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    csv_separator: str = "\t"
    workers: int = 4
    batch_size: int = 64
    accum_freq: int = 1
    seed: int = 0
    shuffle_buffer: int = 5000
    needs_keys: bool = False
    data_size: int | None = None
    decode: str = "fast"
    data_timeout: float = 0.0

    @property
    def samples_per_step(self) -> int:
        """Samples of one rank's batch."""
        return self.batch_size * self.accum_freq


def check_flags(config: DataConfig) -> None:
    """Checks every flag on its own and against the others; reads no file.

    Raises:
        UserError: a value out of range, or flags that contradict each other.
    """
    lowest = {"workers": 0, "batch_size": 1, "shuffle_buffer": 0, "seed": 0}
    for name, least in lowest.items():
        value = getattr(config, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give a number of at least {least}")
    if config.train_num_samples is not None and config.train_num_samples < 1:
        raise UserError(
            f"--train-num-samples is {config.train_num_samples}: give the samples of an epoch, or leave the flag out"
        )
    if config.dataset_type not in DATASET_TYPES:
        raise UserError(f"--dataset-type is {config.dataset_type!r}: choose one of {', '.join(DATASET_TYPES)}")
    if config.decode not in DECODING:
        raise UserError(f"--decode is {config.decode!r}: choose one of {', '.join(DECODING)}")
    kind = resolve_dataset_type(config)
    if config.dataset_resampled and kind != "webdataset":
        raise UserError(f"--dataset-resampled draws tar shards, but the data is {kind}: drop the flag")
    if config.dataset_resampled and config.train_num_samples is None:
        raise UserError(
            "--dataset-resampled has no end of its own: give the samples of an epoch as --train-num-samples"
        )
    if config.train_data_upsampling_factors is not None and not config.dataset_resampled:
        raise UserError(
            f"--train-data-upsampling-factors {config.train_data_upsampling_factors} needs sampling with replacement: "
            "add --dataset-resampled and --train-num-samples, or drop the factors"
        )


def resolve_dataset_type(config: DataConfig) -> str:
    """The kind of data: "webdataset", "csv" or "synthetic", with "auto" decided by the ending of train_data.

    Raises:
        UserError: no --train-data where one is needed, or an ending that says nothing.
    """
    if config.dataset_type == "synthetic":
        return "synthetic"
    if not config.train_data:
        raise UserError("--train-data is missing: give shards or a csv file, or --dataset-type synthetic for a dry run")
    if config.dataset_type != "auto":
        return config.dataset_type
    first = config.train_data.split("::")[0].strip()
    if first.lower().endswith(TABLE_ENDINGS):
        return "csv"
    # A folder needs no ending, and the command of a pipe: may go on after the name of the shard.
    nameless = os.path.isdir(first) or "." not in first.rsplit("/", 1)[-1]
    if nameless or any(ending in first.lower() for ending in TAR_ENDINGS):
        return "webdataset"
    raise UserError(
        f"--train-data {config.train_data}: the kind of data does not show (.tar, .csv, .tsv or a folder); "
        "give --dataset-type webdataset or csv"
    )


def parse_factors(config: DataConfig, sources: int) -> list[float]:
    """The upsampling factor of each "::" source; all 1 without the flag.

    Raises:
        UserError: not numbers, negative, all zero, or not one per source.
    """
    text = config.train_data_upsampling_factors
    if text is None:
        return [1.0] * sources
    try:
        factors = [float(part) for part in text.split("::")]
    except ValueError:
        raise UserError(
            f"--train-data-upsampling-factors {text}: not numbers; write one per source, such as 1::2::0.5"
        ) from None
    if len(factors) != sources:
        raise UserError(
            f"--train-data-upsampling-factors {text} has {len(factors)} factors and --train-data {sources} sources: "
            "give one factor per source"
        )
    if not all(0 <= factor < float("inf") for factor in factors) or sum(factors) == 0:
        raise UserError(f"--train-data-upsampling-factors {text}: factors are finite, not negative, and not all zero")
    return factors
