"""Bytes of a repository in the order they are wanted, fetched ahead by several connections."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue

from flash_moe.pull.ranges import Ranges, Stopped
from flash_moe.pull.repository import RemoteFile

# One connection to a hub's storage gives 25 to 40 MB/s at home, eight give 112.
CONNECTIONS = 8
# A request. Half a second of one such connection, against some 50 ms until its first byte.
RANGE_BYTES = 8 << 20
# Fetched or being fetched and not yet used. What bounds the memory, and what is lost by a kill.
WINDOW_BYTES = 128 << 20


@dataclass(slots=True)
class Segment:
    """A part of a file, to be handed over whole."""

    file: RemoteFile
    start: int
    end: int
    buffer: bytearray = field(default_factory=bytearray, repr=False)
    _missing: int = 0
    _ready: threading.Event = field(default_factory=threading.Event, repr=False)
    _error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


_Work = tuple[Segment, int, int]


def stream(ranges: Ranges, segments: Iterable[Segment]) -> Generator[Segment]:
    """Each segment with its bytes, in order. Close it, and its connections end."""
    work: SimpleQueue[_Work | None] = SimpleQueue()
    # Daemons: a connection that stalls must not hold up the end of the process.
    threads = [
        threading.Thread(target=_fetch, args=(ranges, work), daemon=True)
        for _ in range(CONNECTIONS)
    ]
    for thread in threads:
        thread.start()
    waiting: deque[Segment] = deque()
    ahead = 0
    try:
        for segment in segments:
            while waiting and ahead + segment.nbytes > WINDOW_BYTES:
                ahead -= waiting[0].nbytes
                yield _ready(waiting.popleft())
            _begin(segment, work)
            waiting.append(segment)
            ahead += segment.nbytes
        while waiting:
            yield _ready(waiting.popleft())
    finally:
        for segment in waiting:
            segment._error = Stopped()  # whoever fetches for it sees it before the next range
        for _ in threads:
            work.put(None)


def _begin(segment: Segment, work: SimpleQueue[_Work | None]) -> None:
    segment.buffer = bytearray(segment.nbytes)
    starts = range(0, segment.nbytes, RANGE_BYTES)
    segment._missing = len(starts)
    for at in starts:
        work.put((segment, at, min(at + RANGE_BYTES, segment.nbytes)))
    if not starts:
        segment._ready.set()


def _ready(segment: Segment) -> Segment:
    # In pieces: a wait without end cannot be interrupted by Ctrl-C everywhere.
    while not segment._ready.wait(1.0):
        pass
    if segment._error is not None:
        raise segment._error
    return segment


_COUNTING = threading.Lock()


def _fetch(ranges: Ranges, work: SimpleQueue[_Work | None]) -> None:
    while (item := work.get()) is not None:
        segment, start, end = item
        try:
            if segment._error is None:
                part = memoryview(segment.buffer)[start:end]
                ranges.fill(segment.file, segment.start + start, part)
        except BaseException as error:
            segment._error = error
        with _COUNTING:
            segment._missing -= 1
            if segment._error is not None or not segment._missing:
                segment._ready.set()
