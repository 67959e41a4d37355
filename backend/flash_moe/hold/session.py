"""One who asks, on the side of the process that holds the model. Nothing is computed before it is
asked for, and what nobody waits for any more is not computed to its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Protocol

from flash_moe.callbacks import Cancelled
from flash_moe.hold import protocol
from flash_moe.hold.peer import is_this_user
from flash_moe.hold.protocol import Frame, Malformed
from flash_moe.options import Request
from flash_moe.thread import InferenceThread

# Time for a greeting and a question, both of which come at once.
ASK_SECONDS = 10.0
# Between signs of life.
BREATH_SECONDS = 0.25


class Model(Protocol):
    """What a session needs of the process."""

    identity: str
    thread: InferenceThread
    news: protocol.Alive

    @property
    def is_loaded(self) -> bool: ...
    async def loaded(self) -> None: ...
    def keep(self, seconds: float) -> None: ...
    def begin(self) -> Frame: ...
    def reply(self, request: Request, waited: bool) -> Iterator[Frame]: ...


class Session:
    def __init__(
        self, model: Model, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._model = model
        self._reader, self._writer = reader, writer
        self._wanted = asyncio.Event()
        self._cancelled = threading.Event()
        self._progress: protocol.Alive = None

    async def run(self) -> None:
        """Whatever the other one does, the process lives on."""
        with suppress(OSError, EOFError, Malformed, TimeoutError):
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    ask = await self._greet()
                if ask is not None:
                    await self._answer_while_wanted(ask)
            finally:
                self._writer.close()

    async def _greet(self) -> Frame | None:
        if not is_this_user(self._writer.get_extra_info("socket")):
            return None
        hello = await self._read(protocol.FEW_BYTES)
        await self._say({"hello": self._model.identity})
        if hello != {"hello": self._model.identity}:
            return None
        return await self._read()

    async def _answer_while_wanted(self, ask: Frame) -> None:
        answer, listening = map(asyncio.create_task, (self._answer(ask), self._listen()))
        tasks = (answer, listening)
        try:
            while not await _one_of(tasks, BREATH_SECONDS):
                self._breathe()
            if answer.done():
                await answer
        finally:
            self._cancelled.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self) -> None:
        """Ends when the other one goes, or says what cannot be understood."""
        while True:
            frame = await self._read(protocol.FEW_BYTES)
            if frame == {"cancel": True}:
                self._cancelled.set()
            elif frame != {"next": True}:
                return
            self._wanted.set()

    async def _answer(self, ask: Frame) -> None:
        try:
            async with aclosing(self._frames(ask)) as frames:
                while True:
                    await self._wanted.wait()
                    frame = await anext(frames, None)
                    if frame is None:
                        return
                    if not self._cancelled.is_set():
                        self._wanted.clear()
                    await self._say(frame)
        except (Malformed, ConnectionError):
            raise
        except Exception as error:
            await self._say({"error": protocol.error_to_json(error)})

    async def _frames(self, ask: Frame) -> AsyncGenerator[Frame, None]:
        if "keep" in ask:
            self._model.keep(protocol.seconds_from_json(ask["keep"]))
        request = Request() if "ready" in ask else protocol.request_from_json(ask.get("request"))
        waited = not self._model.is_loaded
        await self._model.loaded()
        if "ready" in ask:
            yield self._model.begin()
            yield {"end": {}}
            return

        def work(gone: Cancelled) -> Iterator[Frame]:
            cancelled = lambda: gone() or self._cancelled.is_set()  # noqa: E731
            asked = replace(request, cancelled=cancelled, progress=self._hear)
            return self._model.reply(asked, waited)

        async with aclosing(self._model.thread.aiterate(work)) as frames:
            async for frame in frames:
                yield frame

    def _hear(self, done: int, total: int) -> None:
        """In the inference thread."""
        self._progress = ["prompt", done, total]

    def _breathe(self) -> None:
        """To one who waits, and takes what it is sent."""
        if self._wanted.is_set() and not self._writer.transport.get_write_buffer_size():
            news, self._progress = self._progress or self._model.news, None
            self._writer.write(protocol.pack({"alive": news}))

    async def _read(self, most: int = protocol.MOST_BYTES) -> Frame:
        header = await self._reader.readexactly(protocol.LENGTH.size)
        return protocol.unpack(await self._reader.readexactly(protocol.length(header, most)))

    async def _say(self, frame: Frame) -> None:
        self._writer.write(protocol.pack(frame))
        await self._writer.drain()


async def _one_of(tasks: Iterable[asyncio.Task[None]], seconds: float) -> bool:
    """Whether one of them is done within the time."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)
