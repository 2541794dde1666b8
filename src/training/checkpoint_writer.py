"""Writes checkpoints, in the background if asked to, and removes those that are no longer wanted. On rank 0 only.

A place that is full or cannot be written to costs checkpoints, not the run: it is said in the log, with the last one that is
whole, and training goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training.atomic_files import link_atomically, remove, write_atomically
from training.checkpoint import LATEST, NAME, checkpoint_files, newest_whole
from training.host_copy import HostCopy
from training.table_files import remove_unused, table_folders

OnSaved = Callable[[list[Path], list[Path]], None]


class CheckpointWriter:
    """Writes the checkpoints of a run.

    Args:
        folder: the run's checkpoints/.
        keep_last: after each save only so many epoch_N.pt and so many iter_S.pt stay, those written last; 0: all stay.
            epoch_latest.pt always stays.
        delete_previous: after an epoch_N.pt those with lower numbers go.
        in_background: save() returns when the state is copied to host memory; a thread writes it.
        on_saved: told after each successful save which files were written and which files and folders of tables were
            removed; in the background it is called from the thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 0,
        delete_previous: bool = False,
        in_background: bool = False,
        on_saved: OnSaved | None = None,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.delete_previous = delete_previous
        self.on_saved = on_saved
        self._last_whole: Path | None = None
        self._failure: str | None = None
        self._pending: Future[None] | None = None
        self._host_copy = HostCopy()
        self._executor = _one_thread() if in_background else None

    @property
    def busy(self) -> bool:
        """Whether a save is still being written in the background; save() would wait for it."""
        return self._pending is not None and not self._pending.done()

    @property
    def has_failed(self) -> bool:
        """Whether something went wrong in the background that nobody has been told yet."""
        return self._failure is not None

    def save(self, names: Sequence[str], content: dict[str, Any], facts: dict[str, Any]) -> str | None:
        """Write one checkpoint under all names (further ones are links), then remove what is no longer wanted.

        In the background, nothing of `content` is looked at any more after the return.

        Args:
            names: such as "epoch_3.pt" and "epoch_latest.pt".
            content: what TrainingState.to_checkpoint returns.
            facts: for the sidecars, plain values.

        Returns:
            What went wrong, in one line, if something did: with this save, or in the background with the last one.
        """
        failure = self.wait()
        # Folders of tables that come later belong to a save that comes later.
        folders = table_folders(self.folder)
        if self._executor is None:
            self._write(list(names), content, facts, folders)
            return self._take_failure()
        copied = self._host_copy.take(content)
        self._pending = self._executor.submit(self._write, list(names), copied, dict(facts), folders)
        return failure

    def wait(self) -> str | None:
        """Wait for what is being written.

        Returns:
            What went wrong, if something did that nobody has been told yet.

        Raises:
            Exception: what ended the writing, where it was not the file system.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        return self._take_failure()

    def close(self) -> str | None:
        """wait(), and end the thread. The writer cannot be used any more."""
        try:
            return self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
            self._host_copy = HostCopy()

    def report_failure(self, error: Exception) -> str:
        """Say in the log, in the same way, that another part of a checkpoint could not be written (`save_tables`).

        What other ranks wrote of the same tables is removed.

        Returns:
            The line, as save() would return it.
        """
        failure = self.wait() or self._describe(str(error))
        self._remove_tables(table_folders(self.folder))
        return failure

    def _take_failure(self) -> str | None:
        failure, self._failure = self._failure, None
        return failure

    def _write(self, names: list[str], content: dict[str, Any], facts: dict[str, Any], folders: list[Path]) -> None:
        written: list[Path] = []
        record: dict[str, Any] = {}
        for name in names:
            path = self.folder / name
            try:
                if not written:
                    record = write_atomically(path, content, facts)
                else:
                    link_atomically(written[0], path, record)
            except OSError as error:
                self._failure = self._describe(f"cannot save {path}: {error.strerror or error}")
                # Where the disk is full, the tables of a checkpoint that is not there would keep it full.
                self._remove_tables(folders)
                return
            logging.info("saved %s", path)
            written.append(path)
            self._last_whole = path
        removed = [path for path in self._unwanted(written) if _removed(path)]
        removed += self._remove_tables(folders)
        if self.on_saved is not None:
            self.on_saved(written, removed)

    def _describe(self, failure: str) -> str:
        last = self._last_whole or newest_whole(self.folder)[0]
        failure = f"{failure}; the last whole checkpoint is {last or 'none yet'}"
        logging.error("%s; training goes on (--strict-save ends it)", failure)
        return failure

    def _unwanted(self, written: list[Path]) -> list[Path]:
        """What --keep-last and --delete-previous-checkpoint have go, never what has just been written.

        The last files by time of writing are kept, as those are the ones that `newest_checkpoint` would go on from.
        """
        numbers: dict[Path, int] = {}
        kinds: dict[str, list[Path]] = {"epoch": [], "iter": []}
        for path in checkpoint_files(self.folder):
            match = NAME.fullmatch(path.name)
            if path.name != LATEST and match is not None:
                numbers[path] = int(match["number"])
                kinds[match["kind"]].append(path)
        unwanted = [path for files in kinds.values() for path in files[self.keep_last :]] if self.keep_last else []
        new = [numbers[path] for path in kinds["epoch"] if path in written]
        if self.delete_previous and new:
            unwanted += [path for path in kinds["epoch"] if numbers[path] < max(new) and path not in unwanted]
        return [path for path in unwanted if path not in written]

    def _remove_tables(self, folders: list[Path]) -> list[Path]:
        try:
            return remove_unused(self.folder, folders)
        except OSError as error:
            logging.warning("unused tables in %s cannot be removed: %s", self.folder, error.strerror or error)
            return []


def _removed(path: Path) -> bool:
    try:
        remove(path)
    except OSError as error:
        logging.warning("%s cannot be removed: %s", path, error.strerror or error)
        return False
    return True


def _one_thread() -> ThreadPoolExecutor:
    """An executor whose only thread runs already.

    A process that is forked (a loader's worker) in the moment a thread starts can hang, so none is started later on. When the
    interpreter ends, even by an exception, it waits for what is being written.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
    started = threading.Event()
    executor.submit(started.set)
    started.wait()
    return executor
