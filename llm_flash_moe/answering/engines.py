"""The loaded engine, which every model object of the process shares: llm makes new ones all the
time, and one model fills the memory."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from flash_moe import InferenceThread, Settings
from llm_flash_moe import paths
from llm_flash_moe.answering.turnstile import Turnstile
from llm_flash_moe.progress import StatusLine

if TYPE_CHECKING:
    from flash_moe import Engine

T = TypeVar("T")
Cancelled = Callable[[], bool]
Work = Callable[["Engine", Cancelled], Iterator[T]]


class Key(NamedTuple):
    """Which engine a reply needs."""

    folder: Path
    settings: Settings


_turnstile: Turnstile[Key] = Turnstile()
_loaded: dict[Key, Engine] = {}


def _close() -> None:
    while _loaded:
        _loaded.popitem()[1].close()


_thread = InferenceThread(at_end=_close)


def replies(key: Key, work: Work[T]) -> Iterator[T]:
    """Do the work with an engine, loaded if it is not yet."""
    waiting = StatusLine("waiting for a reply of another model")
    with _turnstile.passing(key, lambda: waiting.update(0, 1)) as reader:
        waiting.clear()
        with closing(_thread.iterate(lambda cancelled: work(_engine(key), cancelled))) as steps:
            for item in steps:
                with reader.idle():
                    yield item


async def areplies(key: Key, work: Work[T]) -> AsyncGenerator[T, None]:
    async with _turnstile.apassing(key) as reader:
        steps = _thread.aiterate(lambda cancelled: work(_engine(key), cancelled))
        async with aclosing(steps):
            async for item in steps:
                with reader.idle():
                    yield item


def _engine(key: Key) -> Engine:
    """In the inference thread."""
    if key not in _loaded:
        from flash_moe import Engine, PrefixSettings

        _close()
        loading = StatusLine("loading", " bytes")
        try:
            prefix = PrefixSettings(folder=paths.prompts())
            _loaded[key] = Engine.load(
                key.folder, key.settings, loading.update, prefix, loading.say
            )
        finally:
            loading.clear()
        if problem := _loaded[key].warning:
            warn(problem)
        if notice := _loaded[key].notice:
            click.echo(notice, err=True)
    return _loaded[key]


@functools.cache
def warn(text: str) -> None:
    """Once: llm asks for the models again and again."""
    click.echo(f"Warning: {text}", err=True)
