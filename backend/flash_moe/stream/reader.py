"""Reads pieces of files into memory, in parallel. Knows file descriptors and buffers, never MLX.

C where it can be compiled, Python's threads elsewhere: from the page cache, C gets 1.4 to 1.9 times
as much, because a thread of Python's takes 8 µs to be handed a piece, and the interpreter's lock to
go on to the next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from flash_moe.errors import NativeUnavailable, OptionError, ReadFailed, Remedy
from flash_moe.options import READ_CHUNK, READ_THREADS
from flash_moe.stream.native_reader import NativeReader, load_native_reader
from flash_moe.stream.store import AT, LENGTH, Pieces

# Below this many bytes a call, handing work to threads of Python costs more than it saves: 8 µs a
# task against 0.5 µs for a bare preadv of a cached page.
SERIAL_BELOW = 1 << 20


@dataclass(slots=True)
class ReadCounters:
    """What has been used since the reader was made, and how much of it was computed where the page
    cache had it. Seconds are those of reading the rest, and of asking."""

    nbytes: int = 0
    mapped: int = 0
    experts: int = 0
    seconds: float = 0.0


class Reader:
    """A pool of reading threads. `read` returns when every byte is there, or raises ReadFailed;
    either way no thread writes any more."""

    def __init__(
        self, threads: int = READ_THREADS, chunk: int = READ_CHUNK, native: bool = True
    ) -> None:
        if not 1 <= threads <= 256:
            raise OptionError(f"threads={threads}: choose 1 to 256 reading threads.")
        if chunk < 16384 or chunk % 16384:
            raise OptionError(f"chunk={chunk}: choose a multiple of 16384 bytes.")
        self.threads = threads
        self.chunk = chunk
        self.counters = ReadCounters()
        self.native: NativeReader | None = None
        if native:
            with suppress(NativeUnavailable):
                self.native = load_native_reader()
        self._pool: ThreadPoolExecutor | None = None

    def read(self, pieces: Pieces, into: memoryview) -> None:
        """Every piece to its place in a buffer."""
        start = time.perf_counter()
        total = int(np.sum(pieces[:, LENGTH]))
        ends = pieces[:, AT] + pieces[:, LENGTH]
        if len(pieces) and (np.min(pieces) < 0 or np.max(ends) > len(into)):
            raise ValueError("a piece that is not within its buffer")
        if self.native is not None:
            error, failed = self.native.read(pieces, into, self.chunk, self.threads)
            if error:
                raise _failure(error, *pieces[failed, :3].tolist())
        elif self.threads == 1 or total < SERIAL_BELOW:
            for file, offset, length, at in pieces.tolist():
                _read_fully(file, offset, into[at : at + length])
        else:
            self._read_in_parallel(pieces, into)
        self.counters.nbytes += total
        self.counters.seconds += time.perf_counter() - start

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read_in_parallel(self, pieces: Pieces, into: memoryview) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "flash-moe-read")
        futures = [self._pool.submit(_read_fully, *task) for task in self._tasks(pieces, into)]
        # All of them before anything is raised, Ctrl-C included.
        try:
            errors = [error for future in futures if (error := future.exception())]
        finally:
            wait(futures)
        if errors:
            raise errors[0]

    def _tasks(self, pieces: Pieces, into: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        for file, offset, length, at in pieces.tolist():
            for done in range(0, length, self.chunk):
                size = min(self.chunk, length - done)
                yield file, offset + done, into[at + done : at + done + size]


def _read_fully(file: int, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done:]], offset + done)
        except OSError as error:
            raise _failure(error.errno, file, offset, len(buffer)) from error
        if count == 0:
            raise _failure(-1, file, offset, len(buffer))
        done += count


def _failure(error: int | None, file: int, offset: int, length: int) -> ReadFailed:
    """-1 is the end of a file."""
    if error == -1:
        size = os.fstat(file).st_size
        return ReadFailed(
            f"A file of experts ends at byte {size}, {offset + length - size} bytes early. "
            "Pack or download the model again."
        )
    return ReadFailed(
        f"The disk failed while reading an expert: {os.strerror(error or 0)}. "
        "Check the disk, then the model.",
        Remedy.VERIFY,
    )
