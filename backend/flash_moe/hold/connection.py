"""The asking end of the socket: frames to and from a process that holds a model."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from flash_moe.callbacks import Notice, Progress, no_notice, no_progress
from flash_moe.errors import FlashMoeError, HolderGone
from flash_moe.hold import protocol
from flash_moe.hold.peer import is_this_user
from flash_moe.hold.places import Place, is_private, printable
from flash_moe.hold.protocol import Frame, Malformed
from flash_moe.options import Request

# A process that holds a model says several times a second that it is alive.
SILENT_SECONDS = 60.0
# How soon Ctrl-C is heard.
TICK_SECONDS = 0.1
# How long a reply that was broken off may take to say how far it was.
LEAVE_SECONDS = 2.0
RECEIVE_BYTES = 1 << 16

ENDED = (
    "The process that held the model ended before its answer did: it was stopped, or the system "
    "took its memory. Ask again: the model is then loaded anew."
)
SILENT = "The process that holds the model has not answered for a minute. Stop it, and ask again."


class Connection:
    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._received = bytearray()

    @classmethod
    def open(cls, place: Place, identity: str, seconds: float) -> Connection | None:
        """None if nobody is there who holds this very thing and answers within the time."""
        if not is_private(place.folder) or not is_private(place.socket):
            return None
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(seconds)
        connection = cls(peer)
        try:
            _connect(peer, place, seconds)
            if is_this_user(peer) and connection._greet(identity, seconds):
                return connection
        except ConnectionRefusedError:
            place.sweep()
        except (OSError, Malformed, HolderGone):
            pass
        connection.close()
        return None

    def _greet(self, identity: str, seconds: float) -> bool:
        self.send({"hello": identity})
        answer = self.receive(time.monotonic() + seconds, protocol.FEW_BYTES)
        return answer == {"hello": identity}

    def send(self, frame: Frame) -> None:
        self._peer.settimeout(SILENT_SECONDS)
        self._peer.sendall(protocol.pack(frame))

    def receive(self, deadline: float, most: int = protocol.MOST_BYTES) -> Frame | None:
        """The next frame; None if it is not whole at the deadline. HolderGone at the end."""
        while (frame := self._frame(most)) is None:
            # Never zero, which would be another mode.
            self._peer.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                piece = self._peer.recv(RECEIVE_BYTES)
            except TimeoutError:
                return None
            if not piece:
                raise HolderGone(ENDED)
            self._received += piece
        return frame

    def _frame(self, most: int) -> Frame | None:
        head = protocol.LENGTH.size
        if len(self._received) < head:
            return None
        end = head + protocol.length(bytes(self._received[:head]), most)
        if len(self._received) < end:
            return None
        body = bytes(self._received[head:end])
        del self._received[:end]
        return protocol.unpack(body)

    def close(self) -> None:
        self._peer.close()


def _connect(peer: socket.socket, place: Place, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return peer.connect(os.fspath(place.socket))
        except BlockingIOError:  # on Linux, when too many are waiting
            if time.monotonic() > deadline:
                raise
            time.sleep(TICK_SECONDS)


@dataclass(frozen=True, slots=True)
class News:
    """Who hears how far the model is loaded, and what takes seconds."""

    progress: Progress = no_progress
    notice: Notice = no_notice


class Answer:
    """The frames of one answer, each asked for when it is wanted; the last one is `end`. Errors of
    the engine are raised as where it is loaded here; HolderGone if the process is not there."""

    def __init__(self, connection: Connection, ask: Frame, request: Request, news: News) -> None:
        self._connection = connection
        self._ask = ask
        self._request = request
        self._news = news
        self._cancelled = False

    def frames(self) -> Iterator[Frame]:
        with as_gone():
            self._connection.send(self._ask)
        frame: Frame = {}
        while "end" not in frame:
            with as_gone():
                if not self._cancelled:
                    self._connection.send({"next": True})
                frame = self._next()
            yield frame

    def rest(self) -> Iterator[Frame]:
        """What still comes of a reply that was broken off, if it comes soon."""
        deadline = time.monotonic() + LEAVE_SECONDS
        with suppress(FlashMoeError), as_gone():
            self._cancel()
            while frame := self._connection.receive(deadline):
                yield frame
                if "end" in frame:
                    return

    def _next(self) -> Frame:
        heard = time.monotonic()
        while True:
            if not self._cancelled and self._request.cancelled():
                self._cancel()
            frame = self._connection.receive(time.monotonic() + TICK_SECONDS)
            if frame is not None:
                heard = time.monotonic()
                if "error" in frame:
                    raise protocol.error_from_json(frame["error"])
                if "alive" not in frame:
                    return frame
                self._tell(frame)
            elif time.monotonic() - heard > SILENT_SECONDS:
                raise HolderGone(SILENT)

    def _cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._connection.send({"cancel": True})

    def _tell(self, frame: Frame) -> None:
        match frame["alive"]:
            case ["prompt", int(done), int(total)]:
                self._request.progress(done, total)
            case ["model", int(done), int(total)]:
                self._news.progress(done, total)
            case str(text):
                self._news.notice(printable(text))


@contextmanager
def as_gone() -> Iterator[None]:
    """What is wrong with the connection is the end of the process at its other side."""
    try:
        yield
    except (OSError, Malformed) as error:
        raise HolderGone(ENDED) from error
