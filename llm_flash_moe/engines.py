"""The loaded model, which every model object of the process shares: llm makes new ones all the
time, and one model fills the memory."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flash_moe.thread import InferenceThread
from llm_flash_moe import cache
from llm_flash_moe.errors import PluginError
from llm_flash_moe.progress import StatusLine

if TYPE_CHECKING:
    from flash_moe.engine import Engine

T = TypeVar("T")
Cancelled = Callable[[], bool]
Work = Callable[["Engine", Cancelled], Iterator[T]]
Key = tuple[Path, tuple[tuple[str, Any], ...]]  # folder, what it is loaded with

WAIT_SECONDS = 0.02


class _Turnstile:
    """Replies of one model may be made side by side; another model waits until they are over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Key | None = None
        self._holders: Counter[int] = Counter()

    def enter(self, key: Key) -> bool:
        with self._lock:
            if self._holders and key != self._key:
                return False
            self._key = key
            self._holders[threading.get_ident()] += 1
            return True

    def leave(self, holder: int) -> None:
        with self._lock:
            self._holders[holder] -= 1
            self._holders += Counter()  # without those that are at 0

    def held_here(self) -> bool:
        return self._holders[threading.get_ident()] > 0


_turnstile = _Turnstile()
_loaded: dict[Key, Engine] = {}


def _close() -> None:
    while _loaded:
        _loaded.popitem()[1].close()


_thread = InferenceThread(at_end=_close)


def replies(key: Key, work: Work[T]) -> Iterator[T]:
    """What the work makes with the model, loaded if it is not yet."""
    waiting = StatusLine("waiting for a reply of another model")
    while not _turnstile.enter(key):
        if _turnstile.held_here():
            raise PluginError(
                "Another model's reply is not read to its end, and one model fills the memory: "
                "read that reply first, or give it up."
            )
        waiting.update(0, 1)
        time.sleep(WAIT_SECONDS)
    waiting.clear()
    holder = threading.get_ident()
    try:
        yield from _thread.iterate(lambda cancelled: work(_engine(key), cancelled))
    finally:
        _turnstile.leave(holder)


async def areplies(key: Key, work: Work[T]) -> AsyncGenerator[T, None]:
    while not _turnstile.enter(key):
        await asyncio.sleep(WAIT_SECONDS)
    holder = threading.get_ident()
    try:
        made = _thread.aiterate(lambda cancelled: work(_engine(key), cancelled))
        async with aclosing(made):
            async for item in made:
                yield item
    finally:
        _turnstile.leave(holder)


def _engine(key: Key) -> Engine:
    """In the inference thread."""
    if key not in _loaded:
        from flash_moe.engine import Engine
        from flash_moe.measure.mlx_library import find_backends
        from flash_moe.model.load import Settings
        from flash_moe.prefix.store import PrefixSettings

        if mend := find_backends().mend:
            warn(f"MLX is not using the back end that was installed for it. To mend that: {mend}")
        _close()
        path, chosen = key
        loading = StatusLine("loading", " bytes")
        try:
            kept = PrefixSettings(folder=cache.folder())
            _loaded[key] = Engine.load(path, Settings(**dict(chosen)), loading.update, kept)
        finally:
            loading.clear()
    return _loaded[key]


@functools.cache
def warn(text: str) -> None:
    """Once: llm asks for the models again and again."""
    click.echo(f"Warning: {text}", err=True)
