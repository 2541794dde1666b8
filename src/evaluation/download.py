#!/usr/bin/env python3
"""Fetch the evaluation sets of DataComp that are missing from a folder, and mend those that are damaged.

    python src/evaluation/download.py data/datacomp
    python src/evaluation/download.py data/datacomp --tasks vtab,imagenet1k --workers 8

What lies there is compared with the hub, size and checksum, and kept. Interrupted and started again, it goes on with the files
that are not whole, from their beginnings. A set that cannot be fetched does not stop the others; the last lines say what is
still missing and where it is to be had.

Status 0: all sets are there and whole; 1: some are not; 2: a mistake in the flags, or too little room; 130: Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script, Python puts this folder first on the path; its modules would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from huggingface_hub.utils import disable_progress_bars

from evaluation.datacomp.hub import Checked, FetchError, Hub, Unreachable, check, elsewhere, fetch_set, own_copy
from evaluation.datacomp.selection import selected_tasks
from evaluation.datacomp.tasks import Task
from evaluation.errors import UserError, one_line


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags → namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", metavar="DATA_DIR", help="the folder of the sets; made if it is not there")
    parser.add_argument("--tasks", metavar="LIST", help="keys, names or groups, with commas (default: all 40)")
    parser.add_argument("--workers", type=int, default=4, help="files fetched or checked at a time")
    parser.add_argument("--endpoint", metavar="URL", help="another hub (default: HF_ENDPOINT, else huggingface.co)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1, please.")
    return args


def look(
    hub: Hub, tasks: Sequence[Task], data_dir: Path, pool: ThreadPoolExecutor
) -> tuple[list[Checked], dict[str, str]]:
    """Compare all sets with the hub. Returns those that the hub has, and key → why not for the others."""
    found, failed = [], {}
    unreachable: Unreachable | None = None
    for task in tasks:
        place = elsewhere(task, data_dir)
        if place is not None:
            print(f"{task.key}: lies in {place}, left as it is", flush=True)
            continue
        try:
            if unreachable is not None:
                raise unreachable
            remote = hub.look_up(task)
            place = own_copy(remote, data_dir)
            if place is not None:
                print(f"{task.key}: lies in {place}, in other files than the hub's, left as it is", flush=True)
                continue
            found.append(check(remote, data_dir, pool))
        except FetchError as error:
            if isinstance(error, Unreachable) and not found and not failed:
                unreachable = error  # from the beginning: trying again for each set would only take long
            failed[task.key] = str(error)
            print(f"{task.key}: {error}", flush=True)
    return found, failed


def check_room(data_dir: Path, found: Sequence[Checked]) -> None:
    """Before anything is fetched.

    Raises:
        UserError: the disk is too small for all that is wanted.
    """
    wanted = [file.size for checked in found for file in checked.wanted]
    # A damaged file stays until the new one is whole.
    needed, free = sum(wanted) + max(wanted, default=0), shutil.disk_usage(data_dir).free
    if needed > free:
        raise UserError(
            f"{data_dir} has {_gigabytes(free)} free and {_gigabytes(needed)} are needed: "
            "make room, choose another folder or fewer sets with --tasks."
        )


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def download(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    tasks = selected_tasks(args.tasks)
    data_dir = Path(args.data_dir)
    hub = Hub(args.endpoint)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{data_dir} cannot be made ({error.strerror}); choose another folder.") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    pool = ThreadPoolExecutor(args.workers)
    try:
        found, failed = look(hub, tasks, data_dir, pool)
        check_room(data_dir, found)
        for number, checked in enumerate(found, 1):
            failed.update(_fetch(hub, checked, data_dir, pool, f"[{number}/{len(found)}]"))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    staging = data_dir / ".download"
    shutil.rmtree(staging, ignore_errors=True)
    for task in tasks:
        if task.key in failed:
            print(f"still missing: {task.key}: {failed[task.key]}: {hub.url(task)}")
    print(f"{len(tasks) - len(failed)} of {len(tasks)} sets are there", flush=True)
    return 1 if failed else 0


def _fetch(hub: Hub, checked: Checked, data_dir: Path, pool: ThreadPoolExecutor, number: str) -> dict[str, str]:
    key = checked.remote.task.key
    whole = f"{len(checked.whole)} files are whole"
    if checked.wanted:
        print(
            f"{number} {key}: {whole}, {len(checked.wanted)} to fetch, {_gigabytes(checked.bytes_wanted)}", flush=True
        )
    else:
        print(f"{number} {key}: {whole}", flush=True)
    try:
        fetch_set(hub, checked, data_dir, pool)
    except FetchError as error:
        print(f"{number} {key}: {error}", flush=True)
        return {key: str(error)}
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line tool; returns the exit status. A user's mistake is one line on stderr and status 2."""
    try:
        return download(parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; start it again to go on", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not sys.exit: it would wait for the transfers under way, in threads that cannot be stopped.
        os._exit(130)


if __name__ == "__main__":
    raise SystemExit(main())
