"""A copy of a run elsewhere (--remote-sync URL, any file system that fsspec knows), brought up to date in the background.

    URL/NAME/checkpoints/epoch_3.pt        a checkpoint
    URL/NAME/checkpoints/epoch_3.pt.json   its sidecar, sent after it: a file without one is not whole
    URL/NAME/checkpoints/tables-…/         its per-sample tables, sent before it
    URL/NAME/checkpoints/epoch_3.pt.new    what is about to replace epoch_3.pt, with a sidecar too
    URL/NAME/metrics.jsonl, out.log, …     the small files of the run folder

At whatever point the sending ends: where there was a whole checkpoint, there is one. What is removed there is only what the
run has removed here and has sent itself, and not before what replaces it has arrived.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.atomic_files import digest, discard, is_record, put_in_place, read_sidecar, temporary_of
from training.checkpoint import NAME, checkpoint_files, newest_checkpoint
from training.errors import UNREADABLE, UserError, reason_of
from training.remote_files import Remote, in_a_line
from training.run_folder import RunFolder
from training.table_files import missing_parts

SMALL_FILES = ("out.log", "params*.txt", "*.jsonl", "data_report.json", "model_configs/*.json")
INTERIM = ".new"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0


class _Stamp(NamedTuple):
    """A local file as it was sent: where all is as it was, it has not changed."""

    bytes: int
    mtime_ns: int
    sha256: str | None = None


class Mirror:
    """What has been sent of a run folder, and the sending of what is new.

    Args:
        remote: where to. folder: the run's folder.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        self.remote = remote
        self.folder = folder
        self._sent: dict[str, _Stamp] = {}
        self._unreadable: dict[str, _Stamp] = {}

    def send_checkpoint(self, path: Path) -> None:
        """Send a checkpoint, unless that has been done: its tables, the file, the sidecar.

        Raises:
            Exception: of the file system there; OSError also where the file is replaced while it is sent.
        """
        place, stamp = self.place(path), _stamp(path)
        record = read_sidecar(path)
        with_record = stamp._replace(sha256=record["sha256"] if record else None)
        if self._sent.get(place) == with_record or self._unreadable.get(place) == stamp:
            return
        try:
            parts = _table_parts(path)
        except UNREADABLE as error:
            if not path.exists():
                raise
            logging.warning("--remote-sync: %s is not sent: it cannot be read (%s)", path, reason_of(error))
            self._unreadable[place] = stamp
            return
        if place not in self._sent and record is not None and _sidecar_there(self.remote, place) == record:
            # Sent by an earlier start of this run, which sent the tables first.
            self._sent.update({self.place(part): _stamp(part) for part in parts})
            self._sent[place] = with_record
            return
        for part in parts:
            self._send_changed(part)
        if self._send_file(path, place, with_record, record):
            self._sent[place] = with_record
            logging.info("sent %s to %s", path.name, self.remote.url)

    def send_small(self, path: Path) -> None:
        """Send one of the small files, if it has changed.

        Raises:
            Exception: of the file system there.
        """
        place = self.place(path)
        if place not in self._sent and path.suffix in (".log", ".jsonl"):
            there = self.remote.read(place)
            if there and not path.read_bytes().startswith(there):
                # What is here is no continuation: somebody may still want what is there.
                self.remote.copy(place, f"{place}.{_before()}")
        self._send_changed(path)

    def remove(self, path: Path) -> None:
        """Remove there what has been removed here, if this run has sent it.

        Args:
            path: of a checkpoint, or of a folder of tables. One that has been written again since stays.

        Raises:
            Exception: of the file system there.
        """
        place = self.place(path)
        ours = [sent for sent in self._sent if sent == place or sent.startswith(f"{place}/")]
        if path.exists() or not ours:
            return
        self._remove_whole(place)
        for sent in ours:
            del self._sent[sent]

    def place(self, path: Path) -> str:
        """Where a file of the run folder stands, relative to that."""
        return path.relative_to(self.folder).as_posix()

    def _send_file(self, path: Path, place: str, stamp: _Stamp, record: dict[str, Any] | None) -> bool:
        """Send a checkpoint's file; what stands there, maybe the only whole one, is not given up before this one is whole.

        Returns:
            Whether it has been sent: one that nothing is known of does not replace a whole one.
        """
        interim = f"{place}{INTERIM}"
        same = self._same_as(place, stamp)
        if same is None and record is not None and _sidecar_there(self.remote, interim) == record:
            same = interim
        if same is None and _sidecar_there(self.remote, place) is not None:
            if record is None:
                return False
            self._send_whole(path, interim, stamp, record)
            same = interim
        self._send_whole(path, place, stamp, record, same)
        # Also where an earlier start has left it.
        self._remove_whole(interim)
        return True

    def _same_as(self, place: str, stamp: _Stamp) -> str | None:
        """Where the same file stands whole under another name."""
        others = (other for other, sent in self._sent.items() if other != place and sent.sha256 is not None)
        return next((other for other in others if self._sent[other].sha256 == stamp.sha256), None)

    def _send_whole(
        self, path: Path, place: str, stamp: _Stamp, record: dict[str, Any] | None, same: str | None = None
    ) -> None:
        """Send a file, or have it copied there from the place where it stands already; then its sidecar."""
        # While the file is being replaced there, its old sidecar must not stand beside it.
        self.remote.remove(f"{place}.json")
        # Whatever stood here is gone now, and nothing else may be copied from it.
        if place in self._sent:
            self._sent[place] = _Stamp(0, 0)
        if same is None or not self._copied(same, place):
            self.remote.send(path, place)
            if _stamp(path) != stamp._replace(sha256=None):
                raise OSError("it was replaced while it was sent")
        if record is not None:
            self.remote.write(f"{place}.json", json.dumps(record).encode())

    def _copied(self, place: str, other: str) -> bool:
        with contextlib.suppress(Exception):  # not every file system can
            self.remote.copy(place, other)
            return True
        return False

    def _remove_whole(self, place: str) -> None:
        self.remote.remove(f"{place}.json")
        self.remote.remove(place)

    def _send_changed(self, path: Path) -> None:
        place, stamp = self.place(path), _stamp(path)
        if self._sent.get(place) != stamp:
            self.remote.send(path, place)
            self._sent[place] = stamp


class RemoteSync:
    """Keeps a remote copy of a run folder up to date from a thread of its own. Nothing that fails there ends the run.

    To be made before the loader starts processes: a process that is forked in the moment a thread starts can hang. Nothing is
    sent before `start`.

    Args:
        url: --remote-sync.
        folder: the run's folder.

    Attributes:
        failures: attempts that failed so far.

    Raises:
        UserError: as `Remote`.
    """

    def __init__(self, url: str, folder: RunFolder) -> None:
        self.remote = Remote(url, folder.name)
        self.folder = folder
        self.failures = 0
        self._mirror = Mirror(self.remote, folder.path)
        self._removed: list[Path] = []
        self._condition = threading.Condition()
        self._is_due = self._is_last = False
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """The folder is as the run goes on from it: send what is not there yet, and see what an earlier start has sent.

        Only what is known to be sent by this run is ever removed.
        """
        with self._condition:
            self._is_due = True
            self._condition.notify()

    def saved(self, written: Sequence[Path], removed: Sequence[Path]) -> None:
        """A checkpoint is there (CheckpointWriter's `on_saved`): send it soon, and remove there what was removed here."""
        logging.debug("to be sent: %s", ", ".join(path.name for path in written))
        with self._condition:
            self._removed += [path for path in removed if path not in self._removed]
            self._is_due = True
            self._condition.notify()

    def finish(self, seconds: float = 600.0) -> bool:
        """Send what is left and end the thread, within a time limit.

        Returns:
            Whether everything has arrived.
        """
        with self._condition:
            self._is_due = self._is_last = True
            self._condition.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            logging.error(
                "--remote-sync %s: not everything was sent within %.0f s (%d attempts failed); it is whole in %s",
                *(self.remote.url, seconds, self.failures, self.folder.path),
            )
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._is_due)
                self._is_due, is_last = False, self._is_last
            problem = self._send_all()
            if problem is None:
                pause = FIRST_PAUSE_S
                if is_last:
                    return
                continue
            self.failures += 1
            self.remote.forget()
            logging.warning(
                "--remote-sync %s: %s; next attempt in %.0f s (%d failed so far)",
                *(self.remote.url, problem, pause, self.failures),
            )
            with self._condition:
                # A new checkpoint and the end of the run are reasons to try at once.
                self._condition.wait_for(lambda: self._is_due, timeout=pause)
                self._is_due = True
            pause = FIRST_PAUSE_S if is_last else min(2 * pause, LONGEST_PAUSE_S)

    def _send_all(self) -> str | None:
        """Send what is new, checkpoints before small files and the newest first; then remove what is to go.

        Returns:
            The first thing that went wrong; the rest has been tried all the same.
        """
        with self._condition:
            # What replaces these is here already. For those that are told from now on it may not be.
            removed = list(self._removed)
        problems = []
        for path in checkpoint_files(self.folder.checkpoints):
            problems += self._attempt(path, self._mirror.send_checkpoint)
        for path in _small_files(self.folder.path):
            problems += self._attempt(path, self._mirror.send_small)
        for path in removed if not problems else ():
            problem = self._attempt(path, self._mirror.remove)
            if not problem:
                with self._condition:
                    self._removed.remove(path)
            problems += problem
        return problems[0] if problems else None

    def _attempt(self, path: Path, action: Callable[[Path], None]) -> list[str]:
        try:
            action(path)
        except Exception as error:
            # Each file system has errors of its own, and whatever it is must not end the run. An older checkpoint may be
            # removed here at any time, and is missed by nobody.
            if not isinstance(error, FileNotFoundError) or path.exists():
                return [f"{self._mirror.place(path)}: {in_a_line(error)}"]
        return []


def fetch_newest(url: str, folder: RunFolder) -> Path | None:
    """Bring the newest whole checkpoint of a run back, with its tables and the small files, where it is newer than those here.

    Small files that are here stay, unless there is a checkpoint here too and the one there is newer: then they are of that
    older part of the run, and are set aside under another name.

    Args:
        url: --remote-sync.
        folder: the run's folder, which exists.

    Returns:
        The checkpoint in `folder.checkpoints`; None where none was fetched.

    Raises:
        UserError: the remote place cannot be read, or this one not written to; there are checkpoints, here or there, and none
            is whole.
    """
    here, damage = _newest_here(folder)
    written = 0 if here is None else _written(here)
    remote = Remote(url, folder.name)
    try:
        places = remote.find()
        newer = [(place, record) for place, record in _with_sidecar(remote, places) if _time_of(record) > written]
        if newer or here is None:
            _fetch_small(remote, places, folder, replace=here is not None)
        fetched, wrong = _fetch_first_whole(remote, places, folder, newer)
    except Exception as error:
        # Each file system has errors of its own.
        raise UserError(f"--remote-sync {url}: {folder.name} cannot be fetched: {in_a_line(error)}") from None
    if here is not None:
        chosen = "there is none newer at" if fetched is None else f"older than {fetched.name}, fetched from"
        logging.info("%s was written %s, %s %s", here, _in_words(written), chosen, url)
    elif fetched is not None:
        logging.info("fetched %s from %s: there was %s here", fetched.name, url, "no whole one" if damage else "none")
    elif damage is not None:
        raise damage
    elif wrong is not None:
        raise UserError(
            f"--remote-sync {url}: no checkpoint in {remote.root}/checkpoints is whole ({wrong}); put back what is missing, "
            f"copy one to {folder.checkpoints} by hand, or remove them to start anew"
        )
    return fetched


def _newest_here(folder: RunFolder) -> tuple[Path | None, UserError | None]:
    """The newest whole checkpoint of the folder, or the mistake that there are only others."""
    try:
        return newest_checkpoint(folder.checkpoints), None
    except UserError as error:
        return None, error


def _fetch_first_whole(
    remote: Remote, places: list[str], folder: RunFolder, candidates: list[tuple[str, dict[str, Any]]]
) -> tuple[Path | None, str | None]:
    """(the first of the candidates that arrives whole, what is wrong with one that is there if none is)."""
    there = [place for place in places if _is_checkpoint(place)]
    wrong = f"{there[0]} has no readable sidecar" if there else None
    for place, record in candidates:
        path = folder.checkpoints / Path(place).name.removesuffix(INTERIM)
        wrong = _fetch_checkpoint(remote, places, place, path, record)
        if wrong is None:
            return path, None
        logging.warning("passed over %s/%s: %s", remote.root, place, wrong)
        wrong = f"{place}: {wrong}"
    return None, wrong


def _with_sidecar(remote: Remote, places: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """(place, what its sidecar says) of the checkpoints there that have one, the one written last first."""
    found = []
    for place in places:
        if not _is_checkpoint(place.removesuffix(INTERIM)) or f"{place}.json" not in places:
            continue
        record = _sidecar_there(remote, place)
        if record is not None:
            # Of one file with two names, the numbered one.
            found.append((_time_of(record), "latest" not in place, place, record))
    return [(place, record) for _, _, place, record in sorted(found, key=lambda entry: entry[:3], reverse=True)]


def _sidecar_there(remote: Remote, place: str) -> dict[str, Any] | None:
    """What the sidecar of `place` says; None without one, and for one that cannot be understood."""
    with contextlib.suppress(ValueError):
        record = json.loads(remote.read(f"{place}.json") or b"")
        if is_record(record):
            return record
    return None


def _is_checkpoint(place: str) -> bool:
    folder, _, name = place.rpartition("/")
    return folder == "checkpoints" and NAME.fullmatch(name) is not None


def _time_of(record: dict[str, Any]) -> int:
    """When a checkpoint was written by its sidecar, in ns since 1970; any time at all is after 0."""
    return record.get("written_ns", 1)


def _written(path: Path) -> int:
    """When a checkpoint here was written, in ns since 1970, and not before the time that `newest_checkpoint` goes by."""
    return max(path.stat().st_mtime_ns, _time_of(read_sidecar(path) or {}))


def _in_words(written_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written_ns / 1e9))


def _fetch_small(remote: Remote, places: list[str], folder: RunFolder, replace: bool) -> None:
    """Bring the small files; those that are here stay, or are set aside where the one there does not go on from them."""
    for place in places:
        path = folder.path / place
        if not any(Path(place).match(pattern) for pattern in SMALL_FILES) or (path.exists() and not replace):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        fetched = temporary_of(path)
        remote.fetch(place, fetched)
        if path.exists() and not fetched.read_bytes().startswith(path.read_bytes()):
            os.replace(path, path.with_name(f"{path.name}.{_before()}"))
        os.replace(fetched, path)


def _before() -> str:
    """What is added to the name of a file that is set aside."""
    return f"before-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


def _fetch_checkpoint(remote: Remote, places: list[str], place: str, path: Path, record: dict[str, Any]) -> str | None:
    """Bring one checkpoint with its tables; it gets its name last. Returns what is wrong with it, if something is."""
    temporary = temporary_of(path)
    try:
        remote.fetch(place, temporary)
        if temporary.stat().st_size != record["bytes"] or digest(temporary) != record["sha256"]:
            return "its checksum differs from that of what was written"
        try:
            content = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        except UNREADABLE as error:
            return f"it cannot be read ({reason_of(error)})"
        tables = content.get("tables")
        if tables is not None:
            folder = path.parent / tables
            folder.mkdir(exist_ok=True)
            for part in places:
                if part.startswith(f"checkpoints/{tables}/"):
                    remote.fetch(part, folder / part.rpartition("/")[2])
            wrong = missing_parts(folder, content.get("table_rows"))
            if wrong is not None:
                return wrong
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # The order in time of the files of a run is what `newest_checkpoint` goes by.
        written = record.get("written_ns", time.time_ns())
        os.utime(temporary, ns=(written, written))
        put_in_place(temporary, path, record)
    finally:
        discard(temporary)
    return None


def _small_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file())


def _table_parts(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's tables, each sidecar after its part."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    tables = content.get("tables") if isinstance(content, dict) else None
    return sorted((checkpoint.parent / tables).glob("*.pt*")) if tables is not None else []


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return _Stamp(found.st_size, found.st_mtime_ns)
