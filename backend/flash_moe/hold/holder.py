"""The process that holds a model: it answers whoever may ask, until nobody has for so long.

Sockets are served in the main thread, the model runs in the inference thread alone. It ends when it
has been idle for its time; when its socket is removed, as systems do at log-out; when it is told to
(SIGTERM, SIGHUP); and, if it is idle, when another model wants the memory (SIGUSR1).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import flash_moe
from flash_moe import clock
from flash_moe.callbacks import Cancelled
from flash_moe.hold import protocol
from flash_moe.hold.loading import Loading
from flash_moe.hold.places import Holder, Place, namespace
from flash_moe.hold.protocol import Frame
from flash_moe.hold.room import make_room_for
from flash_moe.hold.session import Session
from flash_moe.options import Request
from flash_moe.thread import InferenceThread

if TYPE_CHECKING:
    from flash_moe.engine import Engine

# How often it looks whether its socket is still there.
LOOK_SECONDS = 2.0
# How long a step that is being computed may take when the process is to end.
END_SECONDS = 3.0
# Whoever started it has this long to hear that the model cannot be loaded.
FAILED_SECONDS = 2.0


def main(what: str, lock: int, listener: int) -> None:
    for number in (lock, listener):
        os.set_inheritable(number, False)
    os.umask(0o077)
    value = json.loads(what)
    place = Place(Path(value["folder"]), value["key"])
    loading = Loading.from_json(value["loading"])
    identity = loading.identity()
    complete = True
    # Otherwise files or code have changed in this second, and nobody would ever find it.
    if identity.startswith(place.key):
        process = HolderProcess(place, identity, loading, value["name"], float(value["seconds"]))
        complete = asyncio.run(process.run(socket.socket(fileno=listener)))
    # The lock is free when the process is gone, and its memory with it.
    place.clear(lock)
    if not complete:
        os._exit(0)


class HolderProcess:
    def __init__(
        self, place: Place, identity: str, loading: Loading, name: str, seconds: float
    ) -> None:
        self.identity = identity
        self.thread = InferenceThread(at_end=self._close)
        # For those who wait while the model is loaded: how far it is, or what takes long.
        self.news: protocol.Alive = None
        self._place, self._loading, self._name = place, loading, name
        self._seconds = seconds
        # By the clock on the wall, so that `until` is true also when the machine has slept.
        self._since = self._used = time.time()
        self._sessions: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._told = self._failed = False
        self._engine: Engine | None = None
        self._loaded: asyncio.Task[None] | None = None

    async def run(self, listener: socket.socket) -> bool:
        """Whether everything has come to its end; else something is still being computed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGUSR1, self._end_if_idle)
        mine = self._place.socket.stat()
        server = await asyncio.start_unix_server(self._serve, sock=listener)
        self._loaded = asyncio.create_task(self._load())
        while not self._is_over(mine):
            self._changed.clear()
            with suppress(OSError):  # no room on the disk: replies need none
                self._place.write(self._record())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._pause())
        # From here on nobody finds it; who waits for an answer sees the end of the connection.
        if self._is_there(mine):
            self._place.socket.unlink(missing_ok=True)
        server.close()
        for session in self._sessions:
            session.cancel()
        return await self._come_to_an_end()

    @property
    def is_loaded(self) -> bool:
        return self._engine is not None

    async def loaded(self) -> None:
        """Wait until the model is there. Errors are those of `Engine.load`."""
        assert self._loaded is not None
        await asyncio.shield(self._loaded)

    def keep(self, seconds: float) -> None:
        self._seconds = seconds

    def begin(self) -> Frame:
        assert self._engine is not None
        return protocol.begin_frame(self._engine.plan, self._engine.lossy, self._engine.warning)

    def reply(self, request: Request, waited: bool) -> Iterator[Frame]:
        """In the inference thread. `waited`: for the model, whose loading is then part of the time
        before the first word."""
        if not waited:
            clock.take()
        assert self._engine is not None
        reply = self._engine.reply(request)
        yield self.begin()
        for event in reply.events():
            yield {"event": protocol.event_to_json(event)}
        if request.logprobs is not None:
            yield from protocol.logprobs_frames(reply.logprobs())
        yield protocol.end_frame(reply.stats, reply.complete)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._sessions.add(task)
        self._changed.set()
        try:
            await Session(self, reader, writer).run()
        finally:
            self._sessions.discard(task)
            self._used = time.time()
            self._changed.set()

    async def _load(self) -> None:
        def load(cancelled: Cancelled) -> Iterator[None]:
            # After the greeting: these take a second, or many after a start of the machine.
            from flash_moe.engine import Engine
            from flash_moe.prefix.store import PrefixSettings

            make_room_for(self._loading, self._place.key)
            self._engine = Engine.load(
                self._loading.path,
                self._loading.settings,
                self._hear,
                PrefixSettings(folder=self._loading.prompts),
                self._hear_of,
            )
            yield None

        try:
            async with aclosing(self.thread.aiterate(load)) as steps:
                async for _ in steps:
                    pass
        except Exception:
            self._failed = True
            raise
        finally:
            self.news = None
            self._used = time.time()
            self._changed.set()

    def _hear(self, done: int, total: int) -> None:
        self.news = ["model", done, total]

    def _hear_of(self, text: str) -> None:
        self.news = text

    def _end(self) -> None:
        self._told = True
        self._changed.set()

    def _end_if_idle(self) -> None:
        if not self._sessions:
            self._end()

    def _is_over(self, mine: os.stat_result) -> bool:
        if self._told or not self._is_there(mine):
            return True
        if self._sessions or self._loaded is None or not self._loaded.done():
            return False
        return time.time() >= self._until()

    def _until(self) -> float:
        return self._used + (FAILED_SECONDS if self._failed else self._seconds)

    def _is_there(self, mine: os.stat_result) -> bool:
        """The socket, and not another in its place."""
        try:
            return os.path.samestat(mine, self._place.socket.lstat())
        except OSError:
            return False

    def _pause(self) -> float:
        left = LOOK_SECONDS if self._sessions else self._until() - time.time()
        return min(LOOK_SECONDS, max(0.01, left))

    def _record(self) -> Holder:
        settings = self._loading.settings
        return Holder(
            key=self._place.key,
            pid=os.getpid(),
            name=self._name,
            path=str(self._loading.path),
            settings=settings.given(),
            version=flash_moe.__version__,
            since=self._since,
            used=self._used,
            until=None if math.isinf(self._until()) else self._until(),
            answering=len(self._sessions),
            namespace=namespace(),
        )

    async def _come_to_an_end(self) -> bool:
        try:
            async with asyncio.timeout(END_SECONDS):
                await asyncio.gather(*self._sessions, return_exceptions=True)
                # Whatever the inference thread has to do comes before this.
                async with aclosing(self.thread.aiterate(lambda cancelled: iter(()))) as nothing:
                    async for _ in nothing:
                        pass
        except TimeoutError:
            return False
        return True

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
