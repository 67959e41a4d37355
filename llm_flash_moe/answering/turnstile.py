"""Replies of one model may be made side by side; a reply of another model waits until they are
over, because one model fills the memory. Nobody waits for itself, or for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llm_flash_moe.errors import PluginError

K = TypeVar("K")

# How often a waiting thread draws its status line and can be interrupted.
TICK_SECONDS = 0.2
# What a collected reply needs to be closed by its event loop and the inference thread.
GRACE_SECONDS = 2.0
# A reply that was not read for so long counts as left.
LEFT_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class Reader:
    """Who reads a reply: a thread, and in it a task if the reply is asynchronous. `idle_since` is
    when it was last given something, and None while it waits for more."""

    thread: threading.Thread = field(default_factory=threading.current_thread)
    task: asyncio.Task[Any] | None = None
    idle_since: float | None = None

    def would_wait_for(self, other: Reader) -> bool:
        """Whether the other reply cannot go on while this reader waits."""
        if self.thread is not other.thread:
            return False
        # A thread that waits stops its event loop; a task that waits stops only itself.
        return self.task is None or other.task is None or self.task is other.task

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While the reader does something else than wait for more."""
        self.idle_since = time.monotonic()
        yield
        self.idle_since = None


class Turnstile(Generic[K]):
    def __init__(self, left_seconds: float = LEFT_SECONDS) -> None:
        self._left_seconds = left_seconds
        self._lock = threading.Lock()
        self._key: K | None = None
        self._readers: set[Reader] = set()
        self._waiting: list[Future[None]] = []

    @contextmanager
    def passing(self, key: K, waits: Callable[[], None] = lambda: None) -> Iterator[Reader]:
        """PluginError instead of waiting for oneself; `waits` is called while others are waited
        for."""
        reader = Reader()
        while turn := self._enter(key, reader):
            if self._is_blocked(reader):
                gc.collect()  # closes replies that were dropped half-read
                self._require_unblocked(reader)
            waits()
            with suppress(FutureTimeout):
                turn.result(TICK_SECONDS)
            turn.cancel()
        try:
            yield reader
        finally:
            self._leave(reader)

    @asynccontextmanager
    async def apassing(self, key: K) -> AsyncIterator[Reader]:
        reader = Reader(task=asyncio.current_task())
        while turn := self._enter(key, reader):
            if self._is_blocked(reader):
                gc.collect()
                # The event loop closes them, when it comes to it.
                await _wait(turn, GRACE_SECONDS)
                self._require_unblocked(reader)
            else:
                await _wait(turn, TICK_SECONDS)
        try:
            yield reader
        finally:
            self._leave(reader)

    def _enter(self, key: K, reader: Reader) -> Future[None] | None:
        """None if the reader is in; else a future that is done when it is time to try again."""
        with self._lock:
            if not self._readers or key == self._key:
                self._key = key
                self._readers.add(reader)
                return None
            turn: Future[None] = Future()
            self._waiting.append(turn)
            return turn

    def _leave(self, reader: Reader) -> None:
        with self._lock:
            self._readers.discard(reader)
            if self._readers:
                return
            turns, self._waiting = self._waiting, []
        for turn in turns:
            if turn.set_running_or_notify_cancel():
                turn.set_result(None)

    def _is_blocked(self, reader: Reader) -> bool:
        """Whether a reply that must end first never will."""
        now = time.monotonic()
        with self._lock:
            return any(
                reader.would_wait_for(other)
                or (other.idle_since is not None and now - other.idle_since > self._left_seconds)
                for other in self._readers
            )

    def _require_unblocked(self, reader: Reader) -> None:
        if self._is_blocked(reader):
            raise PluginError(
                "A reply of another model has not been read to its end, and one model fills the "
                "memory: read that reply first, or close it."
            )


async def _wait(turn: Future[None], seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.wrap_future(turn), seconds)
