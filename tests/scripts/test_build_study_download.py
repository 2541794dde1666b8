"""Fetching the study's package: from a local server that breaks off, lies and refuses, and with an npm of straw."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "data"
sys.path.insert(0, str(SCRIPTS))

from building import BuildError  # noqa: E402
from icons import download  # noqa: E402
from icons.package import integrity  # noqa: E402

CONTENT = bytes(range(256)) * 2000
PATH = "/npm/@iconify/json/-/json-2.2.535.tgz"


class Registry(BaseHTTPRequestHandler):
    """Serves CONTENT. `break_after` has a number of bytes for each of the next answers, after which they break off."""

    break_after: ClassVar[list[int]] = []
    ranges_asked: ClassVar[list[str | None]] = []
    honours_ranges: ClassVar[bool] = True

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.ranges_asked.append(asked)
        if self.path != PATH:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.honours_ranges else 0
        if start and start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = start + self.break_after.pop(0) if self.break_after else len(CONTENT)
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Registry]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    Registry.break_after, Registry.ranges_asked, Registry.honours_ranges = [], [], True
    expected = tmp_path / "expected"
    expected.write_bytes(CONTENT)
    monkeypatch.setattr(download, "INTEGRITY", integrity(expected))
    expected.unlink()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/npm/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield Registry
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_fetched_once(registry: type[Registry], tmp_path: Path) -> None:
    target = tmp_path / "made" / "package.tgz"
    assert download.fetch_package(target) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    download.fetch_package(target)
    assert registry.ranges_asked == [None]


def test_what_breaks_off_goes_on_from_there(registry: type[Registry], tmp_path: Path) -> None:
    registry.break_after = [1000, 2000]
    target = download.fetch_package(tmp_path / "package.tgz")
    assert target.read_bytes() == CONTENT
    assert registry.ranges_asked == [None, "bytes=1000-", "bytes=3000-"]


def test_a_later_run_goes_on_from_there(registry: type[Registry], tmp_path: Path) -> None:
    registry.break_after = [500] * 4
    target = tmp_path / "package.tgz"
    with pytest.raises(BuildError, match="broke off after 2,000 bytes; run again"):
        download.fetch_package(target)
    assert [path.name for path in tmp_path.iterdir()] == ["package.tgz.part"]
    download.fetch_package(target)
    assert registry.ranges_asked[-1] == "bytes=2000-"
    assert target.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [target]


def test_a_server_without_ranges_sends_all_again(registry: type[Registry], tmp_path: Path) -> None:
    registry.honours_ranges = False
    registry.break_after = [500]
    assert download.fetch_package(tmp_path / "package.tgz").read_bytes() == CONTENT
    assert registry.ranges_asked == [None, "bytes=500-"]


def test_a_part_that_is_whole_needs_no_more(registry: type[Registry], tmp_path: Path) -> None:
    (tmp_path / "package.tgz.part").write_bytes(CONTENT)
    assert download.fetch_package(tmp_path / "package.tgz").read_bytes() == CONTENT


def test_another_file_is_not_kept(registry: type[Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "INTEGRITY", "sha512-other")
    with pytest.raises(BuildError, match=r"checksum differs.*--package"):
        download.fetch_package(tmp_path / "package.tgz")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_file_is_given_up(registry: type[Registry], tmp_path: Path) -> None:
    """The next run begins anew and succeeds."""
    (tmp_path / "package.tgz.part").write_bytes(b"something else")
    with pytest.raises(BuildError, match="checksum differs"):
        download.fetch_package(tmp_path / "package.tgz")
    assert download.fetch_package(tmp_path / "package.tgz").read_bytes() == CONTENT


def test_a_file_that_is_there_is_checked(registry: type[Registry], tmp_path: Path) -> None:
    target = tmp_path / "package.tgz"
    target.write_bytes(CONTENT[:-1])
    with pytest.raises(BuildError, match=f"{target} is not @iconify/json 2.2.535"):
        download.fetch_package(target)
    assert registry.ranges_asked == []


def test_what_the_server_lacks(registry: type[Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = download.os.environ["npm_config_registry"]
    monkeypatch.setenv("npm_config_registry", f"{address}elsewhere")
    with pytest.raises(BuildError, match=r"npm/elsewhere/.*HTTP 404.*npm_config_registry"):
        download.fetch_package(tmp_path / "package.tgz")
    assert len(registry.ranges_asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        port = server.server_port
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{port}")
    with pytest.raises(BuildError, match=r"refused after 0 bytes.*npm pack"):
        download.fetch_package(tmp_path / "package.tgz")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def install_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Put a shell script in npm's stead; the folder to pack into is $5."""
    monkeypatch.delenv("npm_config_registry", raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(script: str) -> None:
        (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return install


def test_npm_packs_it(install_npm: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_npm('[ "$1 $2 $4" = "pack @iconify/json@2.2.535 --pack-destination" ] && printf whole > "$5/a.tgz"')
    (tmp_path / "expected").write_bytes(b"whole")
    monkeypatch.setattr(download, "INTEGRITY", integrity(tmp_path / "expected"))
    target = tmp_path / "data" / "package.tgz"
    assert download.fetch_package(target).read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'no such version' >&2; exit 1", r"failed \(no such version\)"),
        ("exit 0", r"failed \(status 0\)"),
        ('printf other > "$5/a.tgz"', "checksum differs"),
    ],
)
def test_npm_fails(install_npm: Callable[[str], None], tmp_path: Path, script: str, message: str) -> None:
    install_npm(script)
    with pytest.raises(BuildError, match=message):
        download.fetch_package(tmp_path / "data" / "package.tgz")
    assert list((tmp_path / "data").iterdir()) == []


def test_without_npm_the_ways_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("npm_config_registry", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"Node.js.*npm_config_registry.*npm pack @iconify/json@2.2.535.*--package"):
        download.fetch_package(tmp_path / "package.tgz")
