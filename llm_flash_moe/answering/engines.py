"""The loaded engine, which every model object of the process shares: llm makes new ones all the
time, and one model fills the memory. A model that another process holds is used there."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from flash_moe import InferenceThread, Settings, errors, hold
from llm_flash_moe import paths
from llm_flash_moe.answering.turnstile import Turnstile
from llm_flash_moe.progress import StatusLine

if TYPE_CHECKING:
    from flash_moe import Engine

T = TypeVar("T")
Cancelled = Callable[[], bool]
Work = Callable[["Engine | hold.HeldModel", Cancelled], Generator[T, None, None]]


class Key(NamedTuple):
    """Which engine a reply needs."""

    folder: Path
    settings: Settings

    @property
    def loading(self) -> hold.Loading:
        return hold.Loading(self.folder, self.settings, paths.prompts())


class Keep(NamedTuple):
    """How long the model stays in memory after the reply, in a process under this name."""

    name: str
    seconds: float


_turnstile: Turnstile[Key] = Turnstile()
_loaded: dict[Key, Engine] = {}
# Replies that a loaded engine is making: until they are over, it must not go.
_made_here: set[object] = set()


def _close() -> None:
    while _loaded:
        _loaded.popitem()[1].close()


_thread = InferenceThread(at_end=_close)


def replies(key: Key, work: Work[T], keep: Keep | None = None) -> Iterator[T]:
    """Do the work with an engine: one that is held, or loaded if it is not yet."""
    waiting = StatusLine("waiting for a reply of another model")
    with _turnstile.passing(key, lambda: waiting.update(0, 1)) as reader:
        waiting.clear()
        with closing(_thread.iterate(lambda gone: _work(key, work, keep, gone))) as steps:
            for item in steps:
                with reader.idle():
                    yield item


async def areplies(key: Key, work: Work[T], keep: Keep | None = None) -> AsyncGenerator[T, None]:
    async with _turnstile.apassing(key) as reader:
        steps = _thread.aiterate(lambda gone: _work(key, work, keep, gone))
        async with aclosing(steps):
            async for item in steps:
                with reader.idle():
                    yield item


def _work(key: Key, work: Work[T], keep: Keep | None, cancelled: Cancelled) -> Iterator[T]:
    """In the inference thread. A process that ends before its first word is not missed: the model
    is then loaded here."""
    loading = StatusLine("loading", " bytes")
    if held := _held(key, keep, hold.News(loading.update, loading.say)):
        begun = False
        try:
            with closing(held), closing(work(held, cancelled)) as items:
                for item in items:
                    loading.clear()
                    begun = True
                    yield item
            if held.warning:
                warn(held.warning)
            return
        except errors.HolderGone:
            if begun:
                raise
        finally:
            loading.clear()
    engine, reply = _engine(key), object()
    _made_here.add(reply)
    try:
        yield from work(engine, cancelled)
    finally:
        _made_here.discard(reply)


def _held(key: Key, keep: Keep | None, news: hold.News) -> hold.HeldModel | None:
    if not (keep and keep.seconds):
        return None if key in _loaded else hold.find(key.loading, keep and keep.seconds, news)
    if _made_here:
        return None
    _close()
    try:
        return hold.start(key.loading, keep.name, keep.seconds, news)
    except (errors.HolderGone, OSError) as error:
        warn(f"{keep.name} does not stay in memory. {error}")
        return None


def _engine(key: Key) -> Engine:
    """In the inference thread."""
    if key not in _loaded:
        from flash_moe import Engine, PrefixSettings

        _close()
        hold.make_room_for(key.loading)
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
