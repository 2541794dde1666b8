"""A stand-in for the hub's file API: data sets in memory, with the ways in which a hub and a network fail."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Content:
    """What the hub has, and what goes wrong.

    Attributes:
        repos: owner/name → revision → path → bytes.
        gated: repositories that ask for a token.
        cut: paths whose transfer breaks off in the middle, the first time.
        corrupt: path → how many times other bytes arrive than the hub lists.
        busy: how many requests are answered with 503.
        stalled: while it is set, no file is sent.
        fetched: how often a file was asked for (GET).
        ranges: the Range headers that came.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    corrupt: Counter[str] = field(default_factory=Counter)
    busy: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    fetched: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)

    def commit(self, repo: str, revision: str) -> str:
        """The commit of a branch."""
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def at(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or a commit."""
        for name, files in self.repos.get(repo, {}).items():
            if revision in (name, self.commit(repo, name)):
                return files
        return None


def is_large(path: str) -> bool:
    return path.endswith((".tar", ".parquet"))


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    content: Content

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        content, parts = self.content, [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if content.busy > 0:
            content.busy -= 1
            return self.answer(503, b"busy")
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[1:3])
        if repo in content.gated and self.headers.get("Authorization") != "Bearer secret":
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted"}
            return self.answer(401, b"", headers)
        if repo not in content.repos:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision = parts[5 if api else 4]
        files = content.at(repo, revision)
        if files is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api and parts[4] == "revision":
            facts = {"id": repo, "sha": content.commit(repo, revision), "private": False, "tags": [], "downloads": 0}
            return self.answer(200, json.dumps(facts).encode())
        if api:
            return self.answer(200, json.dumps([self.entry(path, data) for path, data in files.items()]).encode())
        return self.file("/".join(parts[5:]), files, revision)

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob(data)}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def file(self, path: str, files: dict[str, bytes], commit: str) -> None:
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data, content = files[path], self.content
        etag = hashlib.sha256(data).hexdigest() if is_large(path) else blob(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_large(path):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if self.command == "HEAD":
            return self.answer(200, data, headers)
        content.fetched[path] += 1
        while content.stalled.is_set():
            time.sleep(0.02)
        if content.corrupt[path] > 0:
            content.corrupt[path] -= 1
            data = bytes(byte ^ 1 for byte in data)
        status, asked = 200, self.headers.get("Range")
        if asked:
            content.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        if path in content.cut:
            content.cut.discard(path)
            return self.answer(status, data, headers, sent=len(data) // 2)
        return self.answer(status, data, headers)

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
        if sent is not None:
            self.close_connection = True


@contextmanager
def serving(content: Content) -> Iterator[str]:
    """A hub with this content on this machine; gives its address."""
    handler = type("BoundHandler", (Handler,), {"content": content})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
