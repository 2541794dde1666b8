"""Opening a shard, and keeping at it: streams from elsewhere stall, break off and come back.

A command that delivers a shard (of a pipe: URL, or curl for http and https) runs in a process group of its own, so that all
of it can be ended when its output is no longer wanted or does not come.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import select
import signal
import stat
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

import webdataset
from webdataset import utils as webdataset_settings
from webdataset.gopen import Pipe, rewrite_url

from training.data.shards import local_path
from training.data.tar_members import LONGEST_MAGIC, TarBytes, tar_bytes

STALL_SECONDS = 120.0
RETRIES = 4
_BUFFER = 2**18
# A network file system says these in passing; of anything else a second try is no better than the first.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "ENOTCONN", "ECONNRESET", "ECONNABORTED"),
        *("ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENFILE", "ENOMEM"),
    )
    if hasattr(errno, name)
)
# A shell whose command was ended by a closed pipe; curl that could not write.
_PIPE_STATUSES = (0, 141)
_OTHER_STATUSES = (0, 141, 23)


class StreamError(OSError):
    """A stream that broke off; another try may do better."""


class CannotOpenError(Exception):
    """A URL that nothing here can open, on this try or any other."""


@dataclass(frozen=True)
class Patience:
    """How long to keep at a shard that does not come.

    stall: seconds that a stream may be silent.
    retries: how often to try again without getting any further; the waits between are 1, 2, 4, … seconds.
    wait: how to wait that many seconds.
    """

    stall: float = STALL_SECONDS
    retries: int = RETRIES
    wait: Callable[[float], None] = time.sleep

    def pause(self, fruitless: int) -> None:
        """Waits before try number `fruitless` (from 1) since there was progress."""
        self.wait(2.0 ** (fruitless - 1))


def may_pass(url: str, error: Exception) -> bool:
    """Whether it is worth while to try again after an error in opening or reading a shard."""
    return isinstance(error, OSError) and (is_stream(url) or error.errno in _PASSING)


def is_stream(url: str) -> bool:
    """Whether a shard comes from anywhere but a file."""
    return local_path(rewrite_url(url)) is None


@contextlib.contextmanager
def opened(url: str, patience: Patience) -> Iterator[TarBytes]:
    """A shard's bytes, ready to be walked; what delivers them is ended on leaving.

    Raises:
        OSError: it cannot be opened now.
        CannotOpenError: it cannot be opened at all.
    """
    url = rewrite_url(url)
    path = local_path(url)
    if path is not None:
        # Opening a named pipe would wait for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EISDIR, "is not a regular file", path)
        with open(path, "rb") as file:
            yield tar_bytes(file, local=True)
        return
    stream = _open_stream(url, patience)
    try:
        yield tar_bytes(stream, local=False)
    finally:
        with contextlib.suppress(Exception):
            stream.close()


def _open_stream(url: str, patience: Patience) -> io.BufferedReader:
    scheme = urlparse(url).scheme
    if scheme == "pipe" and not webdataset_settings.enforce_security:
        return io.BufferedReader(CommandOutput(_start(url[5:], shell=True), patience.stall, _PIPE_STATUSES), _BUFFER)
    if scheme in ("http", "https"):
        # Without curl's own retries: it begins anew only where nothing has been written yet.
        command = ["curl", "--connect-timeout", "30", "--fail", "--silent", "--location"]
        # If this process is killed, curl ends by itself.
        command += ["--speed-limit", "1", "--speed-time", str(math.ceil(patience.stall)), url]
        return io.BufferedReader(CommandOutput(_start(command), patience.stall, (0,)), _BUFFER)
    try:
        stream = webdataset.gopen(url)
    except OSError:
        raise
    except Exception as error:
        # A ValueError for a scheme nobody knows, an ImportError for hf:// without its library: it is up to the scheme.
        raise CannotOpenError(f"{type(error).__name__} {error}") from error
    if isinstance(stream, Pipe):
        return io.BufferedReader(CommandOutput(stream.proc, patience.stall, _OTHER_STATUSES, stream), _BUFFER)
    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(_Readable(stream), _BUFFER)


def _start(command: str | list[str], shell: bool = False) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            shell=shell,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,
        )
    except OSError as error:
        raise StreamError(f"cannot be started: {error}") from error


class _Readable(io.RawIOBase):
    """What a scheme's own function has opened, of which nothing is known but that it can be read."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        super().close()
        self._stream.close()


class CommandOutput(io.RawIOBase):
    """What a command writes; silence that lasts, and a command that fails, are errors."""

    def __init__(
        self, process: subprocess.Popen[bytes], stall: float, good_statuses: tuple[int, ...], owner: Any = None
    ) -> None:
        """stall: seconds of silence that are borne. owner: kept until the end, since it would close the output."""
        super().__init__()
        assert process.stdout is not None
        self._process = process
        self._output = process.stdout
        self._stall = stall
        self._good_statuses = good_statuses
        self._owner = owner
        self._least = LONGEST_MAGIC
        # A process forked from here has a copy of this object, and is not to end what is not its own.
        self._starter = os.getpid()
        _running.add(self)
        self._poll = select.poll()
        self._poll.register(self._output.fileno(), select.POLLIN)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As much as is there, before the end at least a byte, and at first enough to tell a compressed file by.

        Raises:
            StreamError: silence, or at the end a command that failed.
        """
        view = memoryview(buffer)
        count = self._read(view)
        while 0 < count < self._least and len(view) > count:
            more = self._read(view[count:])
            if not more:
                break
            count += more
        self._least = 1
        if count == 0:
            self._check_status()
        return count

    def _read(self, view: memoryview) -> int:
        if not self._poll.poll(self._stall * 1000):
            raise StreamError(f"stalled for {self._stall:g} s")
        return os.readv(self._output.fileno(), [view])

    def _check_status(self) -> None:
        try:
            status = self._process.wait(self._stall)
        except subprocess.TimeoutExpired:
            raise StreamError(f"does not end after its last byte for {self._stall:g} s") from None
        if status not in self._good_statuses:
            raise StreamError(f"exit status {status}")

    def close(self) -> None:
        """Ends the command, if it has not ended, with all that it started."""
        if self.closed:
            return
        super().close()
        self._output.close()
        if self._process.returncode is None:
            self.end()
            # One that hangs in a system call ends when that does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        if self._owner is not None:
            with contextlib.suppress(Exception):
                self._owner.close()

    def end(self) -> None:
        """Kills the command with all that it started; the output can be closed then."""
        # While it has not been waited for, its number cannot stand for another process.
        if self._process.returncode is not None or self._starter != os.getpid():
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(self._process.pid) == self._process.pid:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()


_running: weakref.WeakSet[CommandOutput] = weakref.WeakSet()


def end_commands() -> None:
    """Kills all commands that deliver streams to this process; for a process that is about to end at once."""
    for output in list(_running):
        output.end()
