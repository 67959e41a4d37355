"""The one thread in which models are loaded and run.

MLX's arrays belong to the thread that made them, and one model fills the memory; so whichever
thread or event loop reads a reply, each of its steps runs here. Replies that are read side by side
take turns, and nothing is computed before it is asked for. The reader only waits, and can be
interrupted while it does.
"""

from __future__ import annotations

import asyncio
import ctypes
import queue
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

from flash_moe.callbacks import Cancelled

T = TypeVar("T")
# From a function that says whether the reader has gone, to the items that the reader waits for.
Work = Callable[[Cancelled], Iterator[T]]


class InferenceThread:
    """Starts with its first work and ends with the process, when `at_end` is called in it."""

    def __init__(self, at_end: Callable[[], None] = lambda: None) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._at_end = at_end
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._open: set[_Steps[Any]] = set()
        self._ended = False

    def iterate(self, work: Work[T]) -> Generator[T, None, None]:
        """The items of the work, each made when it is asked for. Closing the iterator ends the
        work."""
        steps = _Steps(work, self._open)
        try:
            while isinstance(item := self._submit(steps.next).result(), _Item):
                yield item.value
        finally:
            steps.cancelled.set()
            with suppress(CancelledError):
                self._submit(steps.close).result()

    async def aiterate(self, work: Work[T]) -> AsyncGenerator[T, None]:
        """The same for an event loop, which goes on meanwhile."""
        steps = _Steps(work, self._open)
        try:
            while isinstance(item := await asyncio.wrap_future(self._submit(steps.next)), _Item):
                yield item.value
        finally:
            steps.cancelled.set()
            self._submit(steps.close)

    def _submit(self, task: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)

        with self._starting:
            # A reply left half-read is closed with its module, after the end of all threads.
            if self._ended:
                future.cancel()
                return future
            if self._thread is None:
                # Not a daemon: one that is cut off within MLX would take the process down with it.
                self._thread = threading.Thread(target=self._run, name="flash-moe")
                self._thread.start()
                threading.Thread(target=self._watch, name="flash-moe-end", daemon=True).start()
            self._tasks.put(run)
        return future

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
        with self._starting:
            self._ended = True
        while not self._tasks.empty():
            if task := self._tasks.get():
                task()
        for steps in list(self._open):
            with suppress(Exception):
                steps.close()
        self._at_end()
        if "mlx.core" in sys.modules:
            import mlx.core as mx

            mx.synchronize()
            mx.clear_streams()

    def _watch(self) -> None:
        """The interpreter ends the main thread first and then waits for the others."""
        threading.main_thread().join()
        # One more Ctrl-C would break off that wait, and the inference thread within MLX, which
        # crashes. So it ends the process. `signal.signal` is for the main thread alone.
        if callable(signal.getsignal(signal.SIGINT)):
            ctypes.CDLL(None).signal(signal.SIGINT, signal.SIG_DFL)
        for steps in list(self._open):
            steps.cancelled.set()
        self._tasks.put(None)


class _Item(Generic[T]):
    """Distinguishes any value from the end of the work."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value


class _Steps(Generic[T]):
    """One piece of work, which runs in the inference thread alone."""

    def __init__(self, work: Work[T], siblings: set[_Steps[Any]]) -> None:
        self.cancelled = threading.Event()
        self._work = work
        self._siblings = siblings
        self._iterator: Iterator[T] | None = None

    def next(self) -> _Item[T] | None:
        if self._iterator is None:
            self._siblings.add(self)
            self._iterator = self._work(self.cancelled.is_set)
        for item in self._iterator:
            return _Item(item)
        return None

    def close(self) -> None:
        self._siblings.discard(self)
        if close := getattr(self._iterator, "close", None):
            close()
