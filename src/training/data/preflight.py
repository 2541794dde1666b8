"""Finds mistakes in the data and its flags within seconds, before a model is built."""

from __future__ import annotations

import logging
import os
import shlex
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from training.data.config import DataConfig, check_flags, parse_factors, resolve_dataset_type
from training.data.plan import ShardSlice, plan_steps
from training.data.read import Group, read_groups
from training.data.samples import IMAGE_SUFFIXES, BrokenSampleError, parse_key, read_labels
from training.data.shards import READER_THREADS, Shard, expand_sources, local_path
from training.data.sizes import SizedShards, find_sizes
from training.data.streams import Patience
from training.data.tables import SYNTHETIC_STEPS, CsvRows, read_csv
from training.data.tar_headers import check_first_header
from training.errors import UserError

log = logging.getLogger(__name__)

CHECKED_SHARDS = 2000
# An epoch may be shorter than the data by this share before it is worth a warning: published numbers are rounded to batches.
LEFT_OUT = 0.01
# One odd sample at the start of a source is skipped in training too; this many in a row are its form.
CHECKED_SAMPLES = 8
# Before training a mistake is more likely than a line that is down: nobody is made to wait long for its name.
FIRST_LOOK = Patience(stall=30, retries=1)
# When no batch comes, the first shards are looked into in this time, all together.
SHARDS_LOOKED_INTO = 3
LOOK_SECONDS = 20.0
QUICK_LOOK = Patience(stall=5, retries=0)


def check_train_data(config: DataConfig, world_size: int = 1) -> None:
    """Checks flags and data; on one rank or on all.

    Local shards must exist and begin as tar files (of more than 2000, 2000 spread over them are looked into). Of each
    "::" source the first samples are read, one shard of it opened for that even where it is remote.

    Args:
        config: the data flags.
        world_size: number of ranks, by which an epoch must hold a whole global batch.

    Raises:
        UserError: the first mistake found.
    """
    check_flags(config)
    kind = resolve_dataset_type(config)
    if kind == "webdataset":
        _check_shards(config, world_size)
    elif kind == "csv":
        rows = read_csv(config)
        _check_keys(config, f"--train-data {config.train_data}", [len(rows) - 1])
        plan_steps(config, world_size, len(rows))
        _check_first_rows(config, rows)
    else:
        total = config.train_num_samples or SYNTHETIC_STEPS * config.samples_per_step * world_size
        _check_keys(config, "the synthetic data", [total - 1])
        plan_steps(config, world_size, total)


def _check_shards(config: DataConfig, world_size: int) -> None:
    sources = expand_sources(config.train_data or "")
    parse_factors(config, len(sources))
    _check_headers([url for urls in sources for url in urls])
    for urls in sources:
        _check_first_samples(config, urls)
    sized = None if config.dataset_resampled else find_sizes(sources)
    plan_steps(config, world_size, sized.total if sized is not None else None)
    if sized is not None:
        _compare_samples(config, sized)


def _compare_samples(config: DataConfig, sized: SizedShards) -> None:
    """Warns of an epoch that is clearly shorter than the data; one that is longer is a mistake already."""
    wanted, total = config.train_num_samples, sized.total
    if wanted is not None and total is not None and sized.exact and wanted < (1 - LEFT_OUT) * total:
        log.warning(
            "--train-num-samples %d leaves %d of the %d samples out of each epoch (known from %s): give %d to use them all",
            wanted,
            total - wanted,
            total,
            sized.origin,
            total,
        )


def _check_headers(urls: Sequence[str]) -> None:
    paths = [path for path in map(local_path, urls) if path is not None]
    number = min(len(paths), CHECKED_SHARDS)
    chosen = [paths[index * len(paths) // number] for index in range(number)]
    with ThreadPoolExecutor(READER_THREADS) as pool:
        problems = list(pool.map(check_first_header, chosen))
    bad = [(path, problem) for path, problem in zip(chosen, problems) if problem is not None]
    if bad:
        path, problem = bad[0]
        raise UserError(
            f"--train-data: {path} is not a tar file ({problem}), as {len(bad)} of the {len(chosen)} shards looked "
            "into: fetch it again or leave it out"
        )


def _check_first_samples(config: DataConfig, urls: Sequence[str]) -> None:
    """Checks that among the first samples of a source one has all that is needed."""
    problems: list[str] = []
    for url in urls[:CHECKED_SAMPLES]:
        groups = _first_groups(url, problems)
        if groups:
            break
    else:
        # A shard shorter than the slice asks for is no problem, one that has no sample at all is.
        why = f" ({problems[0]})" if problems else ""
        raise UserError(f"--train-data: {urls[0]} yields no sample{why}; correct the path or fetch it again")
    samples = [group.sample(url) for group in groups]
    there = f"the first samples of {url} hold {_suffixes(groups)}"
    if not any(sample.image for sample in samples):
        names = ", ".join("." + suffix for suffix in IMAGE_SUFFIXES)
        raise UserError(f"--train-data: no image, {there}; a sample needs one file named {names}")
    if not any(sample.caption is not None for sample in samples):
        raise UserError(
            f"--train-data: no caption, {there}; a sample needs its caption in utf-8 as .txt, or in its .json as "
            '{"caption": "…"}'
        )
    if config.needs_keys and all(parse_key(sample.key) is None for sample in samples):
        raise UserError(
            f"--train-data: the objective keeps state per sample and needs integer keys, {there}, no .json with "
            '{"key": 17} or {"key": "000017"} among them; number the samples with python -m training.data.index '
            f"{shlex.quote(config.train_data or '')} --add-keys, or choose an objective without such state"
        )
    # Keys grow from shard to shard as a rule: a number that is too small shows at the end.
    if config.needs_keys and local_path(urls[-1]) is not None:
        samples += [group.sample(urls[-1]) for group in _first_groups(urls[-1], problems)]
    keys = [parse_key(sample.key) for sample in samples]
    _check_keys(config, f"{url} or {urls[-1]}", [key for key in keys if key is not None])


def _suffixes(groups: Sequence[Group]) -> str:
    """The suffixes of their members in words."""
    found = sorted({suffix for group in groups for suffix in group.suffixes})
    return ", ".join("." + suffix for suffix in found) or "nothing"


def _first_groups(url: str, problems: list[str], patience: Patience = FIRST_LOOK) -> list[Group]:
    """The first samples of a shard; what is wrong with it is added to `problems`."""
    groups: list[Group] = []
    for item in read_groups(ShardSlice(Shard(url, 0), stop=CHECKED_SAMPLES), patience):
        if isinstance(item, Group):
            groups.append(item)
        else:
            problems.append(f"{item.kind}: {item.detail}")
    return groups


def _check_keys(config: DataConfig, where: str, keys: Sequence[int]) -> None:
    """Checks that a table by keys, if the objective has one, has places for these."""
    if config.needs_keys and config.data_size is not None and max(keys, default=0) >= config.data_size:
        raise UserError(
            f"--data_size {config.data_size} is too small: {where} has a sample with the key {max(keys)}; it counts the "
            f"integer keys, gaps included, so give at least the largest one + 1"
        )


def _check_first_rows(config: DataConfig, rows: CsvRows) -> None:
    first = [rows.sample(index).image for index in range(min(len(rows), CHECKED_SAMPLES))]
    if not any(isinstance(path, str) and os.path.isfile(path) for path in first):
        raise UserError(
            f"--train-data {config.train_data}: the first images do not exist, such as {first[0]!r} in column "
            f"{config.csv_img_key!r}; relative paths start at the working directory, {os.getcwd()}"
        )


def first_shards_hold(config: DataConfig, seconds: float = LOOK_SECONDS) -> str:
    """What the first shards hold, in 1 to 3 lines, for a message when no batch comes.

    Takes at most `seconds`, whatever the data do. Nothing is raised.
    """
    urls: list[str] = []
    lines: list[str] = []
    # A thread of its own: reading from a file system that hangs cannot be given up in any other way.
    looking = threading.Thread(target=_look, args=(config, urls, lines), daemon=True)
    looking.start()
    looking.join(seconds)
    if looking.is_alive():
        where = urls[len(lines)] if len(lines) < len(urls) else config.train_data
        return "\n".join([*lines, f"{where} could not be read within {seconds:g} s"])
    return "\n".join(lines)


def _look(config: DataConfig, urls: list[str], lines: list[str]) -> None:
    """Fills `urls` with what is looked into and `lines` with what is found, one for one."""
    try:
        kind = resolve_dataset_type(config)
        if kind != "webdataset":
            lines.append(f"the data is {kind}: {config.train_data or 'made on the spot'}")
            return
        urls += [url for source in expand_sources(config.train_data or "") for url in source][:SHARDS_LOOKED_INTO]
        for url in urls:
            lines.append(_held(url, config.needs_keys))
    except Exception as error:
        # The message that this is for must come in any case.
        lines.append(f"{config.train_data}: {type(error).__name__} {error}".split("\n")[0])


def _held(url: str, needs_keys: bool) -> str:
    problems: list[str] = []
    groups = _first_groups(url, problems, QUICK_LOOK)
    reasons: Counter[str] = Counter()
    for group in groups:
        try:
            read_labels(group.sample(url), needs_keys)
        except BrokenSampleError as broken:
            reasons[str(broken)] += 1
    left_out = "".join(f"; {number} left out: {reason}" for reason, number in reasons.items())
    damage = f"; {problems[0]}" if problems else ""
    return f"{url}: its first {len(groups)} samples hold {_suffixes(groups)}{left_out}{damage}"
