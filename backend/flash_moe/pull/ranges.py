"""Ranges of a repository's files over HTTP, retried until they are there.

Dropped connections, truncated bodies, stalls, 5xx and 429 are waited out and continued at the byte
that is missing. What cannot be mended by waiting is a FetchFailed. The user's token goes to the hub
alone: never to the storage that the hub sends us to.
"""

from __future__ import annotations

import random
import re
import threading
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from flash_moe.callbacks import Notice, no_notice
from flash_moe.errors import FetchFailed, Remedy
from flash_moe.pull.repository import RemoteFile, Repository, hub_errors, network_errors

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
MOST_REDIRECTS = 5
# A signed address that has run out is asked for anew; a file that is gone stays gone.
EXPIRED = (400, 401, 403, 404, 410)
MOST_ADDRESSES = 4


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `stall`: without a byte, until a connection counts as dead. `pause`: before the
    first retry, twice as long before each that follows, `longest` at most. `give_up`: without a
    byte on any connection, until the pull stops; a router restarts in less. `first`: the same
    before the first byte of all."""

    stall: float = 30.0
    pause: float = 1.0
    longest: float = 30.0
    give_up: float = 600.0
    first: float = 60.0


class Stopped(Exception):
    """The pull ends, and so do its connections."""


class _Again(Exception):
    """Worth another try: after so many seconds if the server says so, or `at_once`, which is
    counted elsewhere."""

    def __init__(self, why: str, seconds: float | None = None, at_once: bool = False) -> None:
        super().__init__(why)
        self.seconds, self.at_once = seconds, at_once


@dataclass(slots=True)
class Ranges:
    """Used by several threads at once."""

    repository: Repository
    patience: Patience = field(default_factory=Patience)
    notice: Notice = no_notice
    # Bytes of bodies that arrived, wanted or not.
    received: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _addresses: dict[str, str] = field(default_factory=dict)
    _asked: dict[str, int] = field(default_factory=dict)
    _last_byte: float = field(default_factory=time.monotonic)
    _waiting: bool = False

    def stop(self) -> None:
        self._stop.set()

    def start(self) -> None:
        """What happened before, such as a question to the user, is no time without a byte."""
        self._last_byte = time.monotonic()

    def whole(self, file: RemoteFile) -> bytes:
        """A small file, checked against its hash."""
        for _ in range(2):
            data = bytearray(file.size)
            self.fill(file, 0, memoryview(data))
            if file.matches(bytes(data)):
                return bytes(data)
        raise FetchFailed(
            f"{file.name} differs from the hash that {self.repository.name} states, twice. "
            "Nothing of it was used."
        )

    def fill(self, file: RemoteFile, start: int, buffer: memoryview) -> None:
        """The bytes of a file from `start` on, as many as `buffer` holds."""
        done, tries = 0, 0
        while done < len(buffer):
            before = done
            try:
                done += self._read(file, start + done, buffer[done:])
                if done == before:
                    raise _Again("an empty answer")
                tries = 0 if done > before else tries
            except _Again as error:
                self._wait(file, error, tries)
                tries += 1

    def _read(self, file: RemoteFile, start: int, buffer: memoryview) -> int:
        """One request; returns how many bytes it brought, which may be fewer."""
        from huggingface_hub.utils import get_session

        done, end = 0, start + len(buffer)
        address = self._address(file)
        try:
            with get_session().stream(
                "GET",
                address,
                headers={
                    **self._headers(address),
                    "Range": f"bytes={start}-{end - 1}",
                    "Accept-Encoding": "identity",
                },
                timeout=self.patience.stall,
                follow_redirects=False,
            ) as response:
                self._require_range(file, response, address, start, end)
                for data in response.iter_raw():
                    if self._stop.is_set():
                        raise Stopped
                    if done + len(data) > len(buffer):
                        raise _Again("more bytes than were asked for")
                    buffer[done : done + len(data)] = data
                    done += len(data)
                    self._arrived(len(data))
        except _Again:
            raise
        except _failures() as error:
            if not done:
                raise _Again(type(error).__name__) from error
        return done

    def _require_range(
        self, file: RemoteFile, response: Any, address: str, start: int, end: int
    ) -> None:
        status = response.status_code
        if 300 <= status < 400 and "Location" in response.headers:
            self._redirected(file, urljoin(address, response.headers["Location"]))
            raise _Again("redirected", at_once=True)
        if status == 429 or status >= 500:
            raise _Again(f"the server answers {status}", _retry_after(response.headers))
        if status in EXPIRED:
            self._forget(file, address, status)
            raise _Again(f"the server answers {status}", at_once=True)
        if status != 206:
            raise _Again(f"the server answers {status}, without a range")
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        given = tuple(map(int, match.groups())) if match else None
        if given is not None and given[2] != file.size:
            raise FetchFailed(
                f"{file.name} has {given[2]} bytes now, and had {file.size} when {self._commit} "
                "was looked at. Nothing of it was used.",
                Remedy.PULL_AGAIN,
            )
        if given != (start, end - 1, file.size):
            raise _Again("the server answers with another range")

    def _address(self, file: RemoteFile) -> str:
        """Where the file's bytes are, as the hub says. Asked once, and anew when that runs out."""
        with self._lock:
            known = self._addresses.get(file.name)
        if known is not None:
            return known
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.repository.name, file.name, revision=self.repository.commit)
        try:
            # Retried here, like everything else, and not by huggingface_hub, which warns.
            metadata = get_hf_file_metadata(url, timeout=self.patience.stall)
        except _failures() as error:
            response: Any = getattr(error, "response", None)
            status = None if response is None else response.status_code
            if status is None or status == 429 or status >= 500:
                after = None if response is None else _retry_after(response.headers)
                raise _Again(f"{type(error).__name__} {status or ''}".strip(), after) from error
            with hub_errors(self.repository.name):
                raise
        etag = metadata.etag or ""
        # Mirrors may give one that is no hash of ours; what arrives is hashed anyway.
        changed = _HASH.fullmatch(etag) and etag != (file.sha256 or file.blob)
        moved = metadata.commit_hash not in (None, self.repository.commit)
        if changed or moved or metadata.size not in (None, file.size):
            raise FetchFailed(
                f"{file.name} is not what it was when {self._commit} was looked at. Nothing of it "
                "was used.",
                Remedy.PULL_AGAIN,
            )
        with self._lock:
            self._addresses[file.name] = metadata.location
        return metadata.location

    def _redirected(self, file: RemoteFile, target: str) -> None:
        if urlsplit(target).scheme not in ("http", "https"):
            raise FetchFailed(f"{file.name} is redirected to what is no web address.")
        self._count(file, "is redirected again and again")
        with self._lock:
            self._addresses[file.name] = target

    def _forget(self, file: RemoteFile, address: str, status: int) -> None:
        with self._lock:
            if self._addresses.get(file.name) != address:
                return  # another thread has a new one already
            del self._addresses[file.name]
        self._count(file, f"cannot be had: the server answers {status}")

    def _count(self, file: RemoteFile, fault: str) -> None:
        """New addresses since the file's last byte, so that none is asked for without end."""
        with self._lock:
            self._asked[file.name] = self._asked.get(file.name, 0) + 1
            if self._asked[file.name] > MOST_ADDRESSES:
                raise FetchFailed(
                    f"{file.name} of {self.repository.name} {fault}.", Remedy.PULL_AGAIN
                )

    def _headers(self, address: str) -> dict[str, str]:
        """With the user's token for the hub itself, without it for any other host."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        if _origin(address) == _origin(constants.ENDPOINT):
            return dict(build_hf_headers())
        return dict(build_hf_headers(token=False))

    def _arrived(self, nbytes: int) -> None:
        with self._lock:
            self.received += nbytes
            self._last_byte = time.monotonic()
            self._waiting = False
            self._asked.clear()

    def _wait(self, file: RemoteFile, error: _Again, tries: int) -> None:
        """Before another try; FetchFailed when it has been too long since the last byte."""
        if error.at_once:
            return
        with self._lock:
            silent = time.monotonic() - self._last_byte
            first, self._waiting = not self._waiting and tries > 0, self._waiting or tries > 0
        if silent > (self.patience.give_up if self.received else self.patience.first):
            raise FetchFailed(
                f"No byte of {file.name} has come for {silent:.0f} seconds: {error}. What is here "
                "already is kept.",
                Remedy.PULL_AGAIN,
            )
        if first:
            self.notice(f"Waiting for {file.name} ({error}); trying again")
        pause = min(self.patience.longest, self.patience.pause * 2 ** min(tries, 10))
        pause *= random.uniform(0.75, 1.25)  # so that connections do not all come back at once
        if error.seconds is not None:
            pause = max(pause, min(error.seconds, self.patience.give_up / 2))
        if self._stop.wait(pause):
            raise Stopped

    @property
    def _commit(self) -> str:
        return f"commit {self.repository.commit[:10]} of {self.repository.name}"


def _failures() -> tuple[type[Exception], ...]:
    """Of connections. RuntimeError: another thread has just closed the client, as huggingface_hub
    does after a failure to connect."""
    return (*network_errors(), RuntimeError)


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def _retry_after(headers: Any) -> float | None:
    """Seconds, or a date."""
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
