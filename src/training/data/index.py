"""Writes sizes.json beside tar shards, from which epochs are planned exactly; adds keys, and verifies shards.

    python -m training.data.index '/data/cc3m/{00000..00331}.tar'                 # sizes.json
    python -m training.data.index '/data/cc3m/{00000..00331}.tar' --add-keys      # and a key for every sample that lacks one
    python -m training.data.index '/data/cc3m/{00000..00331}.tar' --verify        # reads every shard through, writes nothing
    python -m training.data.index '/data/cc3m/{00000..00331}.tar' --check --data_size 3318333 --train-num-samples 2723840

The first walks every shard from the first header to the end-of-archive mark. If one is damaged, it is named, nothing is
written, and the exit status is 1. All print the flags of training that fit the data. A mistake in the flags is exit status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn

from training.atomic_files import replacing
from training.data.key_set import LARGEST_KEY, KeySet
from training.data.keys import FoundKeys, add_keys, check_writable, read_keys
from training.data.shard_pool import usable_cores
from training.data.shards import READER_THREADS, expand_sources, local_path
from training.data.sizes import SIZES_FILE, read_sizes_file
from training.data.tar_headers import count_samples
from training.data.verify import Verified, verify, write_report
from training.errors import UserError

# Bad shards that are named on the screen; the report names all.
_NAMED = 20


def local_shards(train_data: str) -> list[str]:
    """The paths of local shards, each once, in order.

    Args:
        train_data: as for --train-data: patterns, globs or folders, joined by "::".

    Raises:
        UserError: shards that are missing or not local.
    """
    paths: dict[str, None] = {}
    for url in (url for source in expand_sources(train_data) for url in source):
        path = local_path(url)
        if path is None:
            raise UserError(f"{url} is not a local file: run the index command where the shards lie")
        paths[path] = None
    return list(paths)


def write_index(train_data: str) -> dict[str, dict[str, int]]:
    """Counts the samples of local shards and writes sizes.json into each of their folders.

    Entries of an existing sizes.json for other shards are kept while those shards exist.

    Args:
        train_data: as for --train-data: patterns, globs or folders, joined by "::".

    Returns:
        {folder: {name of the shard: samples}}, what was counted.

    Raises:
        UserError: shards that are missing, not local, or damaged; nothing has been written.
    """
    paths = local_shards(train_data)
    with ThreadPoolExecutor(READER_THREADS) as pool:
        counts = list(pool.map(count_samples, paths))
    bad = [f"{path} ({count.damage})" for path, count in zip(paths, counts) if count.damage is not None]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} shards are damaged, no {SIZES_FILE} written; fetch them again: "
            + ", ".join(bad)
        )
    return write_sizes({path: count.samples for path, count in zip(paths, counts)})


def write_sizes(samples: dict[str, int]) -> dict[str, dict[str, int]]:
    """Writes sizes.json into each folder of the shards.

    Args:
        samples: of each shard, by path.

    Returns:
        {folder: {name of the shard: samples}}
    """
    found: dict[str, dict[str, int]] = {}
    for path, number in samples.items():
        folder, name = os.path.split(path)
        found.setdefault(folder, {})[name] = number
    for folder, sizes in found.items():
        _write_sizes(folder, sizes)
    return found


def _write_sizes(folder: str, sizes: dict[str, int]) -> None:
    try:
        before = read_sizes_file(folder)
    except UserError:
        before = {}  # This command is the remedy for a sizes.json that cannot be understood.
    kept = {name: samples for name, samples in before.items() if os.path.isfile(os.path.join(folder, name))}
    content = json.dumps(dict(sorted((kept | sizes).items())), indent=1) + "\n"
    with replacing(Path(folder) / SIZES_FILE) as stream:  # a reader never sees half a file
        stream.write(content.encode("utf-8"))


class _Parser(argparse.ArgumentParser):
    """argparse, with a mistake as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help tells what each flag takes\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = _parse(arguments)
    try:
        if args.add_keys:
            return _add_keys(args)
        if args.verify:
            return _verify(args)
        if args.check:
            return _check(args)
        _print_sizes(found := write_index(args.pattern))
        total = sum(sum(sizes.values()) for sizes in found.values())
        if total:
            print("--check tells --data_size too")
            print(f"flags of training: --train-num-samples {total}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print(
            "error: a process was killed, for want of memory perhaps: run it again with fewer --workers",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        then = "goes on" if args.add_keys else "begins anew, nothing was written"
        print(f"interrupted: the same command {then}", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m training.data.index", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("pattern", help="the shards, written as for --train-data")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--add-keys", action="store_true", help='write an integer "key" into the .json of samples that lack one'
    )
    what.add_argument(
        "--verify",
        action="store_true",
        help="read every shard through and say what is wrong; exit status 1 if anything is",
    )
    what.add_argument("--check", action="store_true", help="say whether --data_size and --train-num-samples fit")
    parser.add_argument("--first-key", type=int, metavar="N", help="with --add-keys: number from N on (0)")
    parser.add_argument(
        "--out", metavar="DIR", help="with --add-keys: write the shards there, leave the old ones alone"
    )
    parser.add_argument("--decode-images", action="store_true", help="with --verify: decode every image too")
    parser.add_argument("--report", metavar="FILE", help="with --verify: write a JSON object per shard, one a line")
    for flag in ("--data_size", "--train_num_samples"):
        parser.add_argument(
            flag, flag.replace("_", "-"), type=int, metavar="N", help="with --check: the flag of training"
        )
    parser.add_argument("--workers", type=int, default=usable_cores(), metavar="N", help="processes (one per core)")
    args = parser.parse_args(arguments)
    needs = {
        "first_key": "add_keys",
        "out": "add_keys",
        "decode_images": "verify",
        "report": "verify",
        "data_size": "check",
        "train_num_samples": "check",
    }
    for flag, other in needs.items():
        value = getattr(args, flag)
        if value is not None and value is not False and not getattr(args, other):
            spelled = "" if value is True else f" {value}"
            parser.error(f"{_spelling(flag)}{spelled} goes with {_spelling(other)}")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give 1 or more")
    if args.first_key is not None and not 0 <= args.first_key <= LARGEST_KEY:
        parser.error(f"--first-key {args.first_key}: give a number of 0 to {LARGEST_KEY}")
    return args


def _spelling(flag: str) -> str:
    """The published flag has an underscore."""
    return "--data_size" if flag == "data_size" else "--" + flag.replace("_", "-")


def _add_keys(args: argparse.Namespace) -> int:
    found, added = add_keys(local_shards(args.pattern), args.first_key or 0, args.out, args.workers)
    print(f"{added:,} keys written, {found.keys.count - added:,} were there")
    if found.without_object:
        print(f"{found.without_object:,} samples are left without a key: their .json is no JSON object, or too long")
    _print_sizes(write_sizes(found.samples))
    _print_flags(found.total, found.keys)
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.report:
        check_writable(os.path.dirname(args.report), f"--report {args.report}")
    verified = verify(local_shards(args.pattern), args.decode_images, args.workers)
    if args.report:
        write_report(verified, args.report)
    bad = verified.bad
    for path, report in list(bad.items())[:_NAMED]:
        wrong = [f"{number:,} x {problem}" for problem, number in sorted(report.problems.items())]
        example = f" (such as {report.examples[0]})" if report.examples else ""
        print(f"bad: {path}: {'; '.join(report.damage + wrong)}{example}")
    if len(bad) > _NAMED:
        print(f"bad: {len(bad) - _NAMED:,} more" + ("" if args.report else "; --report FILE names all"))
    print(verified.summary())
    _print_flags(_samples(verified), verified.keys)
    return 1 if bad else 0


def _check(args: argparse.Namespace) -> int:
    found = read_keys(local_shards(args.pattern), args.workers)
    for problem in found.problems:
        print(f"bad: {problem}")
    fits = [*_fit_of_keys(args.data_size, found), *_fit_of_samples(args.train_num_samples, found.total)]
    for _, line in fits:
        print(line)
    _print_flags(found.total, found.keys)
    return 0 if all(fit for fit, _ in fits) and not found.problems else 1


def _fit_of_keys(data_size: int | None, found: FoundKeys) -> list[tuple[bool, str]]:
    """Whether --data_size fits, and the line that says so; [] where it was not given and all samples have keys."""
    lacking = sum(found.lacking.values()) + found.without_object
    if data_size is None:
        return [(True, f"{lacking:,} of {found.total:,} samples have no key; --add-keys gives one")] if lacking else []
    if lacking:
        return [
            (
                False,
                f"--data_size {data_size}: {lacking:,} of {found.total:,} samples have no key; --add-keys gives one",
            )
        ]
    if found.keys.largest is None:
        return [(False, f"--data_size {data_size}: there is no sample")]
    needed = found.keys.largest + 1
    if data_size < needed:
        return [(False, f"--data_size {data_size} is too small: the largest key is {needed - 1}, give {needed}")]
    return [(True, f"--data_size {data_size} fits: the largest key is {needed - 1}")]


def _fit_of_samples(wanted: int | None, total: int) -> list[tuple[bool, str]]:
    """Whether --train-num-samples fits, and the line that says so; [] where it was not given."""
    if wanted is None:
        return []
    if wanted > total:
        return [(False, f"--train-num-samples {wanted} is too large: there are {total} samples, give {total}")]
    left = f": an epoch leaves {total - wanted:,} of {total:,} samples out" if wanted < total else ""
    return [(True, f"--train-num-samples {wanted} fits{left}")]


def _samples(verified: Verified) -> int:
    return sum(report.samples for report in verified.shards.values())


def _print_sizes(found: dict[str, dict[str, int]]) -> None:
    for folder, sizes in found.items():
        empty = sorted(name for name, samples in sizes.items() if samples == 0)
        note = f" ({len(empty)} without any: {', '.join(empty[:5])})" if empty else ""
        print(f"{os.path.join(folder, SIZES_FILE)}: {len(sizes)} shards, {sum(sizes.values()):,} samples{note}")


def _print_flags(samples: int, keys: KeySet) -> None:
    """The last line, to be pasted; none without samples, which training takes for a mistake."""
    if not samples:
        return
    # Where samples lack keys, or share them, there may be fewer keys than samples, and training refuses that.
    table = f" --data_size {max(keys.largest + 1, samples)}" if keys.largest is not None else ""
    print(f"flags of training: --train-num-samples {samples}{table}")


if __name__ == "__main__":
    sys.exit(main())
