"""A run's folder on a file system elsewhere, of any kind that fsspec knows."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import fsspec

from training.errors import UserError


class Remote:
    """The run's folder at a URL.

    Args:
        url: as fsspec has it: s3://bucket/runs, gs://…, file:///mnt/runs, memory://runs.
        name: the run's.

    Raises:
        UserError: the scheme is unknown, or the package for it is not installed.
    """

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        try:
            self.files, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            scheme = url.partition("://")[0]
            package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
            remedy = f"pip install {package[scheme]}" if scheme in package else " ".join(str(error).split())
            raise UserError(f"--remote-sync {url}: {remedy}") from None
        except Exception as error:
            # Each file system has errors of its own: no credentials, a malformed address.
            raise UserError(f"--remote-sync {url} cannot be opened: {in_a_line(error)}") from None
        self.root = f"{root.rstrip('/')}/{name}"
        self._folders: set[str] = set()

    def check(self, resume: str | None) -> None:
        """Look for the run there, and write a file and remove it again, before training starts.

        Raises:
            UserError: the place cannot be read or written to; a run of this name is there and --resume is not given.
        """
        probe = f"write-test-{os.getpid()}"
        try:
            exists = self.files.exists(f"{self.root}/params.txt")
            self.write(probe, b"")
            self.remove(probe)
        except Exception as error:
            raise UserError(f"--remote-sync {self.url} cannot be read and written to: {in_a_line(error)}") from None
        if exists and resume is None:
            raise UserError(
                f"--remote-sync {self.url} holds a run of this name already ({self.root}): choose another --name, "
                "or add --resume latest to go on with it"
            )

    def send(self, path: Path, place: str) -> None:
        """Copy a local file to `place`, relative to the run's folder. Any exception of the file system may come."""
        self.files.put_file(str(path), self._target(place))

    def write(self, place: str, content: bytes) -> None:
        """Write a small file."""
        self.files.pipe_file(self._target(place), content)

    def copy(self, place: str, other: str) -> None:
        """Copy a file to another place there; nothing goes through this machine, where the file system can do that."""
        self.files.cp_file(f"{self.root}/{place}", self._target(other))

    def fetch(self, place: str, path: Path) -> None:
        """Copy a file from `place` to `path`."""
        self.files.get_file(f"{self.root}/{place}", str(path))

    def read(self, place: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        try:
            return bytes(self.files.cat_file(f"{self.root}/{place}"))
        except FileNotFoundError:
            return None

    def remove(self, place: str) -> None:
        """Remove a file or a folder, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm(f"{self.root}/{place}", recursive=True)

    def find(self) -> list[str]:
        """Places of all files of the run."""
        self.files.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return [path.partition(f"{self.root}/")[2] for path in self.files.find(self.root)]
        return []

    def forget(self) -> None:
        """After a failure: look anew which folders there are."""
        self._folders.clear()
        self.files.invalidate_cache()

    def _target(self, place: str) -> str:
        """The whole name of a file that is to be written; its folder is made."""
        target = f"{self.root}/{place}"
        folder = target.rpartition("/")[0]
        if folder not in self._folders:
            self.files.makedirs(folder, exist_ok=True)
            self._folders.add(folder)
        return target


def in_a_line(error: Exception) -> str:
    """What a file system says, whatever its form."""
    return " ".join(str(error).split())[:300] or type(error).__name__
