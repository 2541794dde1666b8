"""The evaluation sets on the Hugging Face hub: what a set consists of, and fetching it file by file, verified.

djghosh/wds_NAME_test: shards with their text files, into DATA_DIR/wds_NAME_test. nlphuji/NAME: tables in parquet, from the
main branch or, where that has only a script, from the hub's own conversion (refs/convert/parquet), into DATA_DIR/NAME.

A file gets its name in DATA_DIR only when its size and checksum are those of the hub: SHA-256 for large files, git's blob
hash for the others. The hub's client goes on with a transfer that breaks; of a start that is killed, whole files stay and the
others begin anew.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from evaluation.datacomp.errors import MissingData
from evaluation.datacomp.locate import (
    HUB_USER,
    TEXT_FILES,
    find_data,
    is_sharded,
    is_test_file,
    table_files,
    whole_split,
)
from evaluation.datacomp.tasks import Kind, Task
from evaluation.errors import UserError

T = TypeVar("T")

SHARDS_USER = "djghosh"
CONVERTED = "refs/convert/parquet"
TRIES = 4
FIRST_PAUSE = 1.0  # seconds before the second try; doubled with each


class FetchError(Exception):
    """A set that cannot be fetched; the message says why, in one line."""


class Unreachable(FetchError):
    """The hub does not answer, or may not be asked: what holds for one set holds for all."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a set: its path in the repository, its bytes, and its SHA-256, or else git's blob hash, in hexadecimal."""

    path: str
    size: int
    sha256: str | None
    blob: str


@dataclass
class RemoteSet:
    """A set on the hub, at one commit.

    Attributes:
        task: the task that reads it.
        repo: owner/name of the data set.
        commit: the commit that all files are of.
        files: what the task needs of it.
    """

    task: Task
    repo: str
    commit: str
    files: list[RemoteFile]


@dataclass
class Checked:
    """A set against the data folder. whole: files that are there; wanted: files that are missing or damaged."""

    remote: RemoteSet
    whole: list[RemoteFile] = field(default_factory=list)
    wanted: list[RemoteFile] = field(default_factory=list)

    @property
    def bytes_wanted(self) -> int:
        """How much is to be fetched."""
        return sum(file.size for file in self.wanted)


def is_table(task: Task) -> bool:
    """Whether the task reads tables, not shards."""
    return task.kind in (Kind.RETRIEVAL, Kind.WINOGAVIL)


def repository(task: Task) -> str:
    """owner/name of the task's data set on the hub."""
    return f"{HUB_USER if is_table(task) else SHARDS_USER}/{task.folder}"


def elsewhere(task: Task, data_dir: Path) -> Path | None:
    """Where the set lies complete in a layout that is not fetched here, for example a cache of the datasets library."""
    try:
        found = find_data(task, data_dir)
    except UserError:
        return None
    return None if found.is_relative_to(data_dir / task.folder) else found


def own_copy(remote: RemoteSet, data_dir: Path) -> Path | None:
    """Where a table's own folder holds the test split in other files than the hub's: no second copy may come beside it.

    Raises:
        FetchError: such a split is incomplete, or there are several.
    """
    task = remote.task
    if not is_table(task):
        return None
    try:
        found = find_data(task, data_dir)
        if is_sharded(found):
            return found
        files = table_files(task, data_dir)
    except MissingData:
        return None
    except UserError as error:
        raise FetchError(str(error)) from None
    listed = {data_dir / task.folder / file.path for file in remote.files}
    if listed.issuperset(files):
        return None
    if not whole_split(files):
        raise FetchError(f"{found} holds a part of another copy of the test split: remove it")
    return found


class Hub:
    """A hub's data sets.

    Args:
        endpoint: its address; None for HF_ENDPOINT or the public one. HF_TOKEN is used where it is set.

    Raises:
        UserError: that is no address.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self.api = HfApi(endpoint=endpoint)
        if not _is_address(self.api.endpoint):
            raise UserError(f"--endpoint (or HF_ENDPOINT) {self.api.endpoint} is no address: give https://HOST.")

    def url(self, task: Task) -> str:
        """The page of a task's data set."""
        return f"{self.api.endpoint}/datasets/{repository(task)}"

    def look_up(self, task: Task) -> RemoteSet:
        """The files that a task needs.

        Raises:
            FetchError: the set is not there, not open to this user, incomplete, or the hub does not answer.
        """
        if not is_table(task):
            found = self._list(task, "main")
            found.files = _shard_files(found)
            return found
        for revision in ("main", CONVERTED):
            try:
                found = self._list(task, revision)
            except FetchError:
                if revision == "main":
                    raise
                break
            found.files = _table_files(found)
            if found.files:
                return found
        raise FetchError(f"neither main nor {CONVERTED} has a parquet file of a test split")

    def fetch(self, remote: RemoteSet, file: RemoteFile, folder: Path, staging: Path) -> None:
        """Fetch one file into the set's folder; it appears there whole and verified, or not at all.

        Raises:
            FetchError: it cannot be fetched, or what arrives is not what the hub lists.
        """
        problem = ""
        for _ in range(2):  # a damaged transfer may be a matter of chance
            path = Path(
                _persistently(
                    lambda: self.api.hf_hub_download(
                        remote.repo,
                        file.path,
                        repo_type="dataset",
                        revision=remote.commit,
                        local_dir=staging,
                        force_download=True,
                    )
                )
            )
            problem = difference(path, file)
            if not problem:
                destination = folder / file.path
                destination.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, destination)
                return
            path.unlink()
        raise FetchError(f"{file.path}: {problem}, fetched twice")

    def _list(self, task: Task, revision: str) -> RemoteSet:
        repo = repository(task)
        info = _persistently(lambda: self.api.dataset_info(repo, revision=revision))
        commit = str(info.sha)
        entries = _persistently(
            lambda: list(self.api.list_repo_tree(repo, recursive=True, repo_type="dataset", revision=commit))
        )
        files = []
        for entry in entries:
            size = getattr(entry, "size", None)
            if size is not None and _is_inside(entry.path):
                lfs = entry.lfs
                files.append(RemoteFile(entry.path, size, lfs.sha256 if lfs else None, entry.blob_id))
        return RemoteSet(task, repo, commit, files)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_inside(path: str) -> bool:
    """A repository is other people's: a name that leads out of the set's folder is not followed."""
    return not path.startswith("/") and ".." not in path.split("/")


def _persistently(call: Callable[[], T]) -> T:
    """Call the hub, again after a failure that may pass.

    Raises:
        FetchError: it does not pass.
        Unreachable: there has been no answer at all.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:  # the client's transport has errors of its own, which change between its versions
            if isinstance(error, OfflineModeIsEnabled):
                raise Unreachable("HF_HUB_OFFLINE is set: unset it to fetch") from None
            final = _why_final(error)
            if not final and attempt == TRIES and not isinstance(error, HfHubHTTPError):
                raise Unreachable(_reason(error)) from None
            if final or attempt == TRIES:
                raise FetchError(final or _reason(error)) from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def _why_final(error: Exception) -> str:
    """Why there is no sense in trying again; empty if there is."""
    if isinstance(error, GatedRepoError):
        return "gated: accept its terms on its page, and set HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError):  # the client's name for a hub that does not answer
        return ""
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
        return f"not there, or not open to you ({_reason(error)}); HF_TOKEN may help"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 500
        return "" if status >= 500 or status in (408, 429) else _reason(error)
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EROFS,
        errno.ENOTDIR,
    ):
        return f"cannot be written: {error.strerror}"
    return ""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _shard_files(found: RemoteSet) -> list[RemoteFile]:
    by_path = {file.path: file for file in found.files}
    needed = [*TEXT_FILES, "test/nshards.txt"]
    lacking = [path for path in needed if path not in by_path]
    shards = [path for path in by_path if re.fullmatch(r"test/[0-9]+\.tar", path)]
    if lacking or not shards:
        raise FetchError(f"the hub's copy has no {', '.join(lacking) or 'test/0.tar'}")
    shards.sort(key=lambda path: int(path[5:-4]))
    # The text files last: a set that is being fetched does not look complete.
    return [by_path[path] for path in (*shards, *needed)]


def _table_files(found: RemoteSet) -> list[RemoteFile]:
    """The parquet files of the test split.

    Raises:
        FetchError: for several configurations of which none is the default.
    """
    folders: dict[str, list[RemoteFile]] = {}
    for file in found.files:
        path = PurePosixPath(file.path)
        if path.suffix.lower() == ".parquet" and is_test_file(path):
            folders.setdefault(str(path.parent), []).append(file)
    if len(folders) > 1:
        folders = {folder: files for folder, files in folders.items() if folder.split("/")[0] == "default"} or folders
    if len(folders) > 1:
        raise FetchError(f"several configurations have a test split: {', '.join(sorted(folders))}")
    return sorted(next(iter(folders.values()), []), key=lambda file: file.path)


def difference(path: Path, file: RemoteFile) -> str:
    """In which way a local file is not the hub's, in words; empty if it is the same."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != file.size:
        return f"it has {size:,} bytes instead of {file.size:,}"
    with path.open("rb") as content:
        if file.sha256 is not None:
            same = hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
        else:
            same = hashlib.sha1(b"blob %d\0" % size + content.read()).hexdigest() == file.blob
    return "" if same else "its checksum is not the hub's"


def check(remote: RemoteSet, data_dir: Path, pool: ThreadPoolExecutor) -> Checked:
    """Compare what lies in the data folder with the hub; every byte is read."""
    folder = data_dir / remote.task.folder
    result = Checked(remote)
    for file, problem in zip(remote.files, pool.map(lambda file: difference(folder / file.path, file), remote.files)):
        (result.wanted if problem else result.whole).append(file)
    return result


def fetch_set(hub: Hub, checked: Checked, data_dir: Path, pool: ThreadPoolExecutor) -> None:
    """Fetch the files of a set that are missing or damaged, several at a time.

    Raises:
        FetchError: for the first that cannot be fetched; the others are fetched all the same.
    """
    remote = checked.remote
    folder, staging = data_dir / remote.task.folder, data_dir / ".download" / remote.task.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        running = [pool.submit(hub.fetch, remote, file, folder, staging) for file in checked.wanted]
        errors = [error for error in (future.exception() for future in running) if error is not None]
    except BaseException:
        # Ctrl-C: what has not begun must not, or it would find the folder of unfinished files gone.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if errors:
        raise errors[0] if isinstance(errors[0], FetchError) else FetchError(_reason(errors[0]))
    try:
        find_data(remote.task, data_dir)
    except MissingData as error:
        raise FetchError(f"the hub's copy is incomplete: {error}") from None
    except UserError as error:
        raise FetchError(str(error)) from None
