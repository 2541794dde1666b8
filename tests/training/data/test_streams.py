"""Streams that stall, break off, lie or fail; nothing of what delivered them stays behind."""

from __future__ import annotations

import errno
import gzip
import http.server
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from webdataset.gopen import Pipe, gopen_schemes

from training.data.plan import ShardSlice
from training.data.read import read_slots
from training.data.samples import Problem, RawSample
from training.data.shards import Shard
from training.data.streams import Patience
from training.data.workers import heed_parent_only

SAMPLES = 12
BYTES = 6 * 512  # of a sample
_turns = itertools.count()
# A time that no other process sleeps for, by which its own are found.
SLEEP = f"3000.{os.getpid()}"


@pytest.fixture
def shard(kit, tmp_path: Path) -> Path:
    return kit.write_shards(tmp_path, [SAMPLES])[0]


class Waits(list):
    """How long was waited; no time passes."""

    def patience(self, stall: float = 60.0, retries: int = 4) -> Patience:
        return Patience(stall, retries, self.append)


def in_turn(tmp_path: Path, *commands: str) -> str:
    """A pipe: that runs the first command when opened first, and so on; the last one from then on."""
    counter = tmp_path / f"turn{next(_turns)}"
    counter.write_text("")
    cases = " ".join(f"{number}) {command};;" for number, command in enumerate(commands[:-1], 1))
    return f"pipe:printf x >> {counter}; case $(wc -c < {counter}) in {cases} *) {commands[-1]};; esac"


def read(url: str, patience: Patience, **part: int) -> list[RawSample]:
    return list(read_slots(ShardSlice(Shard(url, 0), **part), patience))


def problems(slots: list[RawSample]) -> list[str | None]:
    return [slot.problem for slot in slots]


def running(moments: int = 40) -> list[str]:
    """Command lines of processes, zombies among them, that sleep; those that are about to end get a moment."""
    for _ in range(moments):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if SLEEP in line and int(folder.name) != os.getpid():
                found.append(line)
        if not found:
            return []
        time.sleep(0.05)
    return found


def children() -> set[str]:
    """Processes that this thread has started, those among them that nobody has waited for yet."""
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
        return set(file.read().split())


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before
    assert running() == []


def whole(shard: Path) -> list[tuple]:
    return [slot[:3] for slot in read(str(shard), Patience())]


BROKEN = {
    "exit status": "head -c {half} {shard}; exit 7",
    "early end": "head -c {half} {shard}",
    "nothing": "true",
    "fails at once": "exit 3",
    "garbage": "head -c {half} {shard}; head -c 5000 /dev/zero | tr '\\0' x",
    "stall": "head -c {half} {shard}; sleep {sleep}",
    "stalls in silence": "sleep {sleep}",
    "does not end": "exec 9>&1; head -c {half} {shard}; exec >&-; sleep {sleep} 9>&-; true",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_stream_that_breaks_off_goes_on_where_it_was(shard: Path, tmp_path: Path, how: str) -> None:
    broken = BROKEN[how].format(half=5 * BYTES + 700, shard=shard, sleep=SLEEP)
    waits = Waits()
    url = in_turn(tmp_path, broken, f"cat {shard}")
    slots = read(url, waits.patience(stall=0.3), stop=SAMPLES)
    assert problems(slots) == [None] * SAMPLES
    assert [slot[:3] for slot in slots] == whole(shard)
    assert waits == [1.0]
    assert running() == []


@pytest.mark.parametrize("how", ["exit status", "fails at once", "stall"])
def test_a_stream_is_given_up(shard: Path, how: str) -> None:
    waits = Waits()
    url = "pipe:" + BROKEN[how].format(half=5 * BYTES + 700, shard=shard, sleep=SLEEP)
    slots = read(url, waits.patience(stall=0.2), stop=SAMPLES)
    good = 0 if how == "fails at once" else 5
    assert problems(slots) == [None] * good + [Problem.STREAM_FAILED] * (SAMPLES - good)
    assert waits == [1, 2, 4, 8]
    assert {"exit status": "exit status 7", "fails at once": "exit status 3", "stall": "stalled for 0.2 s"}[
        how
    ] in slots[-1].name
    unbounded = read(url, waits.patience(stall=0.2, retries=0))
    assert problems(unbounded) == [None] * good + [Problem.STREAM_FAILED]


def test_progress_begins_the_waits_anew(shard: Path, tmp_path: Path) -> None:
    waits = Waits()
    steps = [f"head -c {after * BYTES + 700} {shard}; exit 1" for after in (1, 1, 1, 4, 4, 9)]
    slots = read(in_turn(tmp_path, *steps, f"cat {shard}"), waits.patience(retries=3), stop=SAMPLES)
    assert problems(slots) == [None] * SAMPLES
    assert waits == [1, 2, 4, 1, 2, 1]


def test_data_damaged_where_they_come_from_are_fetched_twice(shard: Path, tmp_path: Path) -> None:
    data = bytearray(shard.read_bytes())
    for sample in (3, 7):
        data[sample * BYTES + 10] ^= 255
    damaged = tmp_path / "damaged"
    damaged.write_bytes(data)
    waits = Waits()
    slots = read(f"pipe:cat {damaged}", waits.patience(), stop=SAMPLES)
    assert waits == [1]
    assert [slot[:2] + slot[3:4] for slot in slots]
    assert problems(slots) == problems(read(str(damaged), Patience(), stop=SAMPLES))
    assert problems(slots).count(Problem.BAD_HEADER) == 2


def test_an_archive_that_has_ended_is_whole_however_its_command_ends(shard: Path) -> None:
    waits = Waits()
    assert problems(read(f"pipe:cat {shard}; exit 1", waits.patience())) == [None] * SAMPLES
    assert waits == []


@pytest.mark.parametrize("ending", ["; sleep {}", "; sleep {} & cat /dev/zero", " | (cat; sleep {})"])
def test_what_is_left_early_is_ended(shard: Path, ending: str) -> None:
    url = f"pipe:cat {shard}{ending.format(SLEEP)}"
    assert len(read(url, Patience(), start=2, stop=4)) == 2
    slots = read_slots(ShardSlice(Shard(url, 0)), Patience())
    next(slots)
    slots.close()
    del slots
    assert running() == []


def test_a_worker_that_is_ended_while_it_waits_ends_its_streams(shard: Path) -> None:
    """As torch ends one that does not answer."""
    url = f"pipe:cat {shard}; sleep {SLEEP}"
    receiving, sending = multiprocessing.Pipe(False)
    worker = multiprocessing.get_context("fork").Process(target=read_as_worker, args=(url, sending))
    worker.start()
    try:
        assert receiving.recv() == SAMPLES - 1
        assert running(1)
    finally:
        worker.terminate()
        worker.join(20)
    assert worker.exitcode == 0
    assert running() == []


def read_as_worker(url: str, answers: multiprocessing.connection.Connection) -> None:
    heed_parent_only(0)
    slots = read_slots(ShardSlice(Shard(url, 0)))
    answers.send(sum(1 for _ in itertools.islice(slots, SAMPLES - 1)))
    # The last one is known to be whole when the stream goes on or ends.
    next(slots)


def test_a_compressed_stream_byte_by_byte(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    url = f"pipe:dd if={tmp_path}/0.tar.gz bs=1 2>/dev/null"
    assert [slot[:3] for slot in read(url, Patience(), stop=SAMPLES)] == whole(shard)
    waits = Waits()
    url = in_turn(tmp_path, f"head -c 300 {tmp_path}/0.tar.gz", f"cat {tmp_path}/0.tar.gz")
    assert problems(read(url, waits.patience(), stop=SAMPLES)) == [None] * SAMPLES
    assert waits == [1]


def test_other_schemes_are_left_to_webdataset(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        """All that webdataset asks of a stream."""

        def __init__(self) -> None:
            self.bytes = io.BytesIO(shard.read_bytes())
            self.read = self.bytes.read
            self.close = self.bytes.close

    def command(words: str) -> Pipe:
        return Pipe(words, mode="rb", shell=True, bufsize=8192)

    monkeypatch.setitem(gopen_schemes, "plain", lambda *_: Plain())
    monkeypatch.setitem(gopen_schemes, "store", lambda *_: command(f"exec cat {shard}"))
    monkeypatch.setitem(gopen_schemes, "slow", lambda *_: command(f"exec sleep {SLEEP}"))
    for scheme in ("plain", "store"):
        assert problems(read(f"{scheme}://0.tar", Patience(), stop=SAMPLES)) == [None] * SAMPLES
    waits = Waits()
    assert problems(read("slow://0.tar", waits.patience(stall=0.1, retries=1))) == [Problem.STREAM_FAILED]
    assert waits == [1]
    assert running() == []
    never = Patience(wait=lambda _seconds: pytest.fail("tried again"))
    assert problems(read("unheard-of://0.tar", never)) == [Problem.UNREADABLE]
    monkeypatch.setenv("GOPEN_REWRITE", f"mirror://={shard.parent}/")
    assert problems(read(f"mirror://{shard.name}", never, stop=SAMPLES)) == [None] * SAMPLES


@pytest.mark.parametrize(("number", "tries"), [(errno.EIO, 3), (errno.ESTALE, 3), (errno.EACCES, 1)])
def test_passing_errors_of_files(shard: Path, number: int, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def failing(path: str, mode: str) -> io.BufferedReader:
        opened.append(path)
        if len(opened) < 3:
            raise OSError(number, os.strerror(number), path)
        return open(path, mode)

    monkeypatch.setattr("training.data.streams.open", failing, raising=False)
    waits = Waits()
    slots = read(str(shard), waits.patience(), stop=SAMPLES)
    assert problems(slots) == [None if tries == 3 else Problem.UNREADABLE] * SAMPLES
    assert len(opened) == tries
    assert waits == [1, 2][: tries - 1]


def test_an_error_in_the_middle_of_a_file(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BufferedReader):
        failures = 0

        def read(self, size: int = -1) -> bytes:
            if self.tell() > 5 * BYTES and Failing.failures < 2:
                Failing.failures += 1
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    monkeypatch.setattr("training.data.streams.open", lambda path, _mode: Failing(io.FileIO(path)), raising=False)
    waits = Waits()
    slots = read(str(shard), waits.patience(), stop=SAMPLES)
    assert problems(slots) == [None] * SAMPLES
    assert [slot.name.split()[-1] for slot in slots] == [f"{number:06d}" for number in range(SAMPLES)]
    assert waits == [1, 2]
    Failing.failures = -100
    slots = read(str(shard), waits.patience(retries=1), stop=SAMPLES)
    assert problems(slots) == [None] * 5 + [Problem.UNREADABLE] * 7


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a file: /good, /cut (half of what it promises, the first time), /stall (half, then silence), or 404."""

    data = b""
    served: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Handler.served.append(self.path)
        if self.path not in ("/good.tar", "/cut.tar", "/stall.tar"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        half = self.path != "/good.tar" and Handler.served.count(self.path) == 1
        self.wfile.write(self.data[: len(self.data) // 2] if half else self.data)
        if half and self.path == "/stall.tar":
            self.wfile.flush()
            self.server.hold.wait(20)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(shard: Path) -> Iterator[str]:
    Handler.data, Handler.served = shard.read_bytes(), []
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.hold = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.hold.set()  # type: ignore[attr-defined]
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize("name", ["good", "cut", "stall"])
def test_http(shard: Path, server: str, name: str) -> None:
    waits = Waits()
    slots = read(f"{server}/{name}.tar", waits.patience(stall=0.5), stop=SAMPLES)
    assert [slot[:3] for slot in slots] == whole(shard)
    assert waits == [1][: len(Handler.served) - 1]
    assert len(Handler.served) == (1 if name == "good" else 2)


def test_http_without_the_file_or_without_curl(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits()
    assert problems(read(f"{server}/none.tar", waits.patience(), stop=3)) == [Problem.STREAM_FAILED] * 3
    assert waits == [1, 2, 4, 8]
    monkeypatch.setenv("PATH", "/nowhere")
    slots = read(f"{server}/good.tar", Waits().patience(), stop=1)
    assert problems(slots) == [Problem.STREAM_FAILED]
    assert "curl" in slots[0].name
