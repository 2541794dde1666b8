"""The same work on every shard, on several processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

# Seconds between two lines about how far the work is, and between two looks at whether the parent still lives.
_NEWS, LOOK = 30.0, 1.0


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each_shard(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, doing: str
) -> Iterator[tuple[Task, Result]]:
    """Calls `function` for every task and yields each with its result, in the order of the tasks.

    Work that takes long says on stderr how far it is. When the caller stops early, what has not begun is left.

    Args:
        function: a function of a module: it is called in other processes.
        workers: processes; 1 for this one alone.
        doing: what is done, for the lines on stderr.

    Raises:
        BrokenProcessPool: a process was killed.
        Exception: whatever `function` raises.
    """
    news = time.monotonic() + _NEWS
    for done, pair in enumerate(zip(tasks, _results(function, tasks, min(workers, len(tasks)))), 1):
        yield pair
        if time.monotonic() > news and done < len(tasks):
            print(f"{doing}: {done:,} of {len(tasks):,} shards", file=sys.stderr, flush=True)
            news = time.monotonic() + _NEWS


def _results(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    if workers <= 1:
        yield from map(function, tasks)
        return
    # Forked processes need not import torch again; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    begin = functools.partial(_begin, os.getpid())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin)
    try:
        yield from pool.map(function, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """How a process of the pool begins: ^C is for its parent, and without its parent it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # A parent that is killed says nothing, and the pool's processes would wait for work for ever.
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)
