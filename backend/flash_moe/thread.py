"""The one thread in which models are loaded and run.

MLX's arrays belong to the thread that made them, and one model fills the memory; so whichever
thread or event loop wants a reply, each of its steps is taken here. Replies that are read side by
side take turns, and nothing is computed before it is asked for. Who asks only waits, and can be
interrupted while it does.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# Given a function that says whether the caller has gone, makes what the caller waits for.
Work = Callable[[Callable[[], bool]], Iterator[T]]


class InferenceThread:
    """Starts with its first work and ends with the process, when `at_end` is called in it."""

    def __init__(self, at_end: Callable[[], None] = lambda: None) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._at_end = at_end
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._open: set[_Steps[Any]] = set()
        self._ended = False

    def iterate(self, work: Work[T]) -> Iterator[T]:
        """What the work makes, as it is asked for. Closing the iterator ends the work."""
        steps = _Steps(work, self._open)
        try:
            while isinstance(item := self._submit(steps.next).result(), _Made):
                yield item.value
        finally:
            steps.cancelled.set()
            with suppress(CancelledError):
                self._submit(steps.close).result()

    async def aiterate(self, work: Work[T]) -> AsyncGenerator[T, None]:
        """The same for an event loop, which goes on meanwhile."""
        steps = _Steps(work, self._open)
        try:
            while isinstance(item := await asyncio.wrap_future(self._submit(steps.next)), _Made):
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
            # What is left half read is closed with its module, after the end of all threads.
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
        for steps in list(self._open):
            steps.cancelled.set()
        self._tasks.put(None)


class _Made(Generic[T]):
    """Told apart from the end, whatever it is that is made."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value


class _Steps(Generic[T]):
    """One piece of work, begun and taken on in the inference thread alone."""

    def __init__(self, work: Work[T], among: set[_Steps[Any]]) -> None:
        self.cancelled = threading.Event()
        self._work = work
        self._among = among
        self._iterator: Iterator[T] | None = None

    def next(self) -> _Made[T] | None:
        if self._iterator is None:
            self._among.add(self)
            self._iterator = self._work(self.cancelled.is_set)
        for item in self._iterator:
            return _Made(item)
        return None

    def close(self) -> None:
        self._among.discard(self)
        if close := getattr(self._iterator, "close", None):
            close()
