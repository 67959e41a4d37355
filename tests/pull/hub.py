"""A server that speaks the hub's protocol, with the faults of real networks on demand.

Two ports, as two hosts: the hub itself, which knows the user's token and sends large files away by
a redirect, and the storage behind it, which must never see that token.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
LARGE = (".safetensors", "tokenizer.json")
FAULTS = (
    *("drop", "truncate", "corrupt", "stall", "500", "503", "429", "403", "200", "shifted"),
    *("redirect", "reset", "longer"),
)
CHUNK = 1 << 20


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Snapshot:
    """A repository at one commit: a folder, and the hashes of its files."""

    folder: Path
    commit: str
    large: dict[str, str] = field(default_factory=dict)
    small: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Snapshot:
        snapshot = cls(folder, "")
        for file in sorted(folder.rglob("*")):
            name = str(file.relative_to(folder))
            if file.is_file() and name.endswith(LARGE):
                with file.open("rb") as data:
                    snapshot.large[name] = hashlib.file_digest(data, "sha256").hexdigest()
            elif file.is_file():
                snapshot.small[name] = git_hash(file.read_bytes())
        listing = json.dumps([snapshot.large, snapshot.small])
        snapshot.commit = hashlib.sha1(listing.encode()).hexdigest()
        return snapshot

    def siblings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name, digest in self.large.items():
            size = (self.folder / name).stat().st_size
            lfs = {"sha256": digest, "size": size, "pointerSize": 134}
            pointer = git_hash(digest.encode())
            found.append({"rfilename": name, "size": size, "blobId": pointer, "lfs": lfs})
        for name, digest in self.small.items():
            size = (self.folder / name).stat().st_size
            found.append({"rfilename": name, "size": size, "blobId": digest})
        return found


# Which fault the next request for bytes meets, if any. Called from many threads.
Trouble = Callable[[], str | None]


class Hub:
    """One repository, named after its folder. `main` is what the branch stands for; older commits
    stay."""

    def __init__(self, folder: Path, organisation: str = "org") -> None:
        self.name = f"{organisation}/{folder.name}"
        self.main = Snapshot.of(folder)
        self.commits = {self.main.commit: self.main}
        self.trouble: Trouble = lambda: None
        # Bytes a second of each connection.
        self.rate: float | None = None
        self.stall_seconds = 1.0
        self.requests: list[tuple[str, str]] = []
        self.served = 0
        # Whether the storage has seen the user's token, and whether the hub has.
        self.leaked = self.known = False
        self.dice = random.Random(0)
        self._lock = threading.Lock()
        self._servers = [_serve(self, storage) for storage in (False, True)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def push(self, folder: Path) -> None:
        """A new commit on main."""
        self.main = Snapshot.of(folder)
        self.commits[self.main.commit] = self.main

    def snapshot(self, revision: str) -> Snapshot | None:
        return self.main if revision == "main" else self.commits.get(revision)

    def count(self, nbytes: int) -> None:
        with self._lock:
            self.served += nbytes

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what is tested here."""


def _serve(hub: Hub, storage: bool) -> _Server:
    handler = _Storage if storage else _Front
    server = _Server(("127.0.0.1", 0), handler)
    server.hub = hub
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def note(self) -> None:
        self.server.hub.requests.append((self.command, self.path))

    def answer(self, status: int, headers: dict[str, Any], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_part(self, path: Path, headers: dict[str, Any]) -> None:
        """Of a file, what Range asks for, with the fault that is due."""
        hub, size = self.server.hub, path.stat().st_size
        fault = hub.trouble() if self.command == "GET" else None
        if fault == "429":
            return self.answer(429, {"Retry-After": "0"})
        if fault in ("500", "503", "403"):
            return self.answer(int(fault), {}, b"no")
        if fault == "redirect":
            return self.answer(302, {"Location": f"{self.path}?again={hub.dice.random()}"})
        if fault == "reset":
            return self.drop()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(match[1]), int(match[2]) + 1) if match else (0, size)
        if fault == "shifted":
            start = max(0, start - 1)
        ranged = match is not None and fault != "200"
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            start, end = 0, size
        longer = 7 if fault == "longer" else 0
        self.send_header("Content-Length", str(end - start + longer))
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.send_bytes(path, start, end, fault)
            self.wfile.write(b"x" * longer)
        return None

    def send_bytes(self, path: Path, start: int, end: int, fault: str | None) -> None:
        hub = self.server.hub
        stop = end
        if fault in ("drop", "truncate", "stall"):
            stop = start + hub.dice.randrange(max(1, end - start))
        with path.open("rb") as file:
            file.seek(start)
            at = start
            while at < stop:
                data = bytearray(file.read(min(CHUNK, stop - at)))
                if fault == "corrupt" and data:
                    data[hub.dice.randrange(len(data))] ^= 1 << hub.dice.randrange(8)
                    fault = None
                if hub.rate:
                    time.sleep(len(data) / hub.rate)
                self.wfile.write(data)
                hub.count(len(data))
                at += len(data)
        if fault == "stall":
            self.wfile.flush()
            time.sleep(hub.stall_seconds)
        if fault in ("drop", "truncate", "stall"):
            self.drop(gently=fault == "truncate")

    def drop(self, gently: bool = False) -> None:
        self.close_connection = True
        if not gently:
            linger = b"\1\0\0\0\0\0\0\0"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.wfile.flush()
        self.connection.close()


class _Front(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.note()
        hub = self.server.hub
        hub.known |= self.headers.get("authorization") == f"Bearer {TOKEN}"
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(rf"/api/models/{hub.name}(?:/revision/(.+))?", path):
            return self.model(match[1] or "main")
        if match := re.fullmatch(rf"/{hub.name}/resolve/([^/]+)/(.+)", path):
            return self.resolve(match[1], match[2])
        return self.answer(404, {"X-Error-Code": "RepoNotFound"})

    def model(self, revision: str) -> None:
        hub = self.server.hub
        snapshot = hub.snapshot(revision)
        if snapshot is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        value = {"id": hub.name, "sha": snapshot.commit, "siblings": snapshot.siblings()}
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def resolve(self, revision: str, name: str) -> None:
        hub = self.server.hub
        snapshot = hub.snapshot(revision)
        if snapshot is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        path = snapshot.folder / name
        headers: dict[str, Any] = {"X-Repo-Commit": snapshot.commit, "Accept-Ranges": "bytes"}
        if name in snapshot.large:
            headers |= {
                "Location": f"{hub.storage}/{snapshot.commit}/{name}",
                "X-Linked-Size": path.stat().st_size,
                "X-Linked-Etag": f'"{snapshot.large[name]}"',
            }
            return self.answer(302, headers)
        if name not in snapshot.small:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        return self.send_part(path, {**headers, "ETag": f'"{snapshot.small[name]}"'})


class _Storage(_Handler):
    def do_GET(self) -> None:
        self.note()
        hub = self.server.hub
        if "authorization" in {key.lower() for key in self.headers}:
            hub.leaked = True
        _, commit, name = unquote(urlsplit(self.path).path).split("/", 2)
        self.send_part(hub.commits[commit].folder / name, {})


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Hub]:
    hub = Hub(folder, **options)
    try:
        yield hub
    finally:
        hub.close()
