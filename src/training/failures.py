"""When one rank fails, all end, and what is read first is why.

Ranks whose peer is gone wait in a collective until its timeout (NCCL), or fail with errors that say nothing (gloo). So a
rank that raises leaves a note in a store that rank 0 keeps, before it ends; every rank looks there once a second. The first
note counts: rank 0 logs it, with the traceback, and every process ends within END_SECONDS.

A process that is killed (kill -9, out of memory) leaves no note. Its launcher sees that: torchrun always, srun with
--kill-on-bad-exit=1; with gloo the others notice too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn
from urllib.parse import urlparse

import torch.distributed as dist

from training.distributed import World

# Within so many seconds after one rank raised all have ended.
END_SECONDS = 10.0
_LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 60.0
_NOTE, _READ, _LEFT = "note", "read", "left"


class FailureWatch:
    """The notes of failed ranks; nothing on a single rank. All ranks make one together.

    Args:
        url: --dist-url, from which rank 0's host is known.
    """

    def __init__(self, world: World, url: str = "env://") -> None:
        self._world = world
        self._store: dist.TCPStore | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._to_be_shown = threading.Lock()
        # One request at a time: the thread's and those of a rank that fails.
        self._lock = threading.Lock()
        if world.size == 1:
            return
        self._store = _meet(world, url)
        self._thread = threading.Thread(target=self._watch, name="failures of other ranks", daemon=True)
        self._thread.start()

    def end_all(self, message: str, status: int, what: str = "failed") -> NoReturn:
        """End this process, and through its note all others.

        Args:
            message: what rank 0 logs and this rank prints: a traceback, or one line after a user's mistake.
            status: exit status of all ranks.
            what: what this rank did, for the other ranks' lines.
        """
        self._closing.set()
        first = self._leave({"rank": self._world.rank, "message": message, "status": status, "what": what})
        self._show(first)
        self._end(first)

    def close(self) -> None:
        """To be called by all ranks when nothing can fail any more; rank 0 returns when no other rank looks any longer."""
        if self._store is None or self._thread is None:
            return
        self._closing.set()
        self._thread.join()
        if self._world.is_main:
            _until(lambda: self._count(_LEFT) >= self._world.size - 1, END_SECONDS)
        else:
            self._tell(_LEFT)
        self._store = None

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_SECONDS):
            note = self._note()
            if note is not None and not self._closing.is_set():
                self._show(note)
                self._end(note)

    def _end(self, note: dict[str, Any]) -> NoReturn:
        """End the process, rank 0 last: the store ends with it."""
        if self._world.is_main:
            self._tell(_READ)
            _until(lambda: self._count(_LEFT) >= self._world.size - 1, END_SECONDS / 3)
        else:
            # Rank 0 speaks first: a launcher kills all processes as soon as one has ended.
            _until(lambda: self._count(_READ) > 0, END_SECONDS / 3)
            self._tell(_LEFT)
        end_process(note["status"])

    def _leave(self, note: dict[str, Any]) -> dict[str, Any]:
        """Leave a note; returns the first one there is, which may be another rank's."""
        if self._store is None:
            return note
        try:
            with self._lock:
                found = self._store.compare_set(_NOTE, "", json.dumps(note))
            return json.loads(found)  # type: ignore[no-any-return]
        except (RuntimeError, ValueError):
            return note  # Rank 0 is gone, and the store with it.

    def _note(self) -> dict[str, Any] | None:
        assert self._store is not None
        try:
            with self._lock:
                return json.loads(self._store.get(_NOTE)) if self._store.check([_NOTE]) else None
        except RuntimeError:
            return None  # Rank 0 is gone; whoever started it will say so.

    def _show(self, note: dict[str, Any]) -> None:
        # The thread and a rank that fails in consequence may both come here.
        if not self._to_be_shown.acquire(blocking=False):
            return
        own = note["rank"] == self._world.rank
        if self._world.is_main and not own:
            logging.error("rank %d %s:\n%s", note["rank"], note["what"], note["message"])
        elif own:
            where = "" if self._world.is_main else f"[rank {self._world.rank}] "
            print(f"{where}{note['message']}", file=sys.stderr, flush=True)
        else:
            why = f"since rank {note['rank']} {note['what']}"
            print(f"[rank {self._world.rank}] ended, {why}", file=sys.stderr, flush=True)

    def _tell(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._add(name, 1)

    def _count(self, name: str) -> int:
        return self._add(name, 0)

    def _add(self, name: str, number: int) -> int:
        """Raises RuntimeError where there is no store (any more)."""
        if self._store is None:
            raise RuntimeError("no store")
        with self._lock:
            return self._store.add(name, number)


def _meet(world: World, url: str) -> dist.TCPStore | None:
    """A store of rank 0's at a port of its own; None on all ranks if one of them does not reach it."""
    host = urlparse(url).hostname or os.environ.get("MASTER_ADDR") or socket.gethostname()
    wait = timedelta(seconds=_CONNECT_SECONDS)
    store, port, problem = None, 0, None
    try:
        if world.is_main:
            store = dist.TCPStore(host, 0, None, True, wait, wait_for_workers=False)
            port = store.port
    except RuntimeError as error:
        problem = str(error)
    port = world.from_main(port)
    if not world.is_main and port:
        try:
            store = dist.TCPStore(host, port, None, False, wait, wait_for_workers=False)
        except RuntimeError as error:
            problem = str(error)
    problems = [(rank, text) for rank, text in enumerate(world.gather(problem)) if text]
    if problems:
        if world.is_main:
            logging.warning(
                "rank %d reaches no store at %s (%s): a rank that fails is noticed when collectives time out",
                problems[0][0],
                host,
                " ".join(problems[0][1].split())[:200],
            )
        return None
    return store


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and not condition():
            time.sleep(0.05)
    except RuntimeError:
        return  # The store is gone: nobody to wait for.


def end_process(status: int) -> NoReturn:
    """End without the interpreter's own way out: it takes seconds, and libraries may wait there for ranks that are gone."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    flushes = [handler.flush for handler in logging.getLogger().handlers]
    for flush in (*flushes, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError):  # a full disk must not keep the process from ending
            flush()
    os._exit(status)
