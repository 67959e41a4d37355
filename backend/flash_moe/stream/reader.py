"""Reads segments into memory, in parallel. Knows file descriptors and buffers, never MLX.

Python threads with `preadv` reach what C threads and io_uring reach on this disk: the GIL is
released while the kernel copies, and reading is all that these threads do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from flash_moe.errors import OptionError, ReadFailed, Remedy
from flash_moe.options import READ_CHUNK, READ_THREADS
from flash_moe.stream.store import Segment, Target

# Below this many bytes a call, handing work to threads costs more than it saves: 8 µs a task
# against 0.5 µs for a bare preadv of a cached page.
SERIAL_BELOW = 1 << 20


@dataclass(slots=True)
class ReadCounters:
    """What has been read since the reader was made."""

    nbytes: int = 0
    experts: int = 0
    seconds: float = 0.0


class Reader:
    """A pool of reading threads. `read` returns when every byte is there, or raises ReadFailed."""

    def __init__(self, threads: int = READ_THREADS, chunk: int = READ_CHUNK) -> None:
        if not 1 <= threads <= 256:
            raise OptionError(f"threads={threads}: choose 1 to 256 reading threads.")
        if chunk < 16384 or chunk % 16384:
            raise OptionError(f"chunk={chunk}: choose a multiple of 16384 bytes.")
        self.threads = threads
        self.chunk = chunk
        self.counters = ReadCounters()
        self._pool = ThreadPoolExecutor(threads, "flash-moe-read") if threads > 1 else None

    def read(self, targets: Sequence[Target]) -> None:
        """Fill each target's buffer (as long as its segment) from the disk."""
        start = time.perf_counter()
        total = sum(segment.length for segment, _ in targets)
        if self._pool is None or total < SERIAL_BELOW:
            for segment, buffer in targets:
                _read_fully(segment.fd, segment.offset, buffer)
        else:
            self._read_in_parallel(self._pool, targets)
        self.counters.nbytes += total
        self.counters.seconds += time.perf_counter() - start

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read_in_parallel(self, pool: ThreadPoolExecutor, targets: Sequence[Target]) -> None:
        pieces = [piece for target in targets for piece in self._pieces(*target)]
        futures = [pool.submit(_read_fully, *piece) for piece in pieces]
        # All of them before anything is raised, Ctrl-C included: no thread may still write
        # when the caller goes on.
        try:
            errors = [error for future in futures if (error := future.exception())]
        finally:
            wait(futures)
        if errors:
            raise errors[0]

    def _pieces(
        self, segment: Segment, buffer: memoryview
    ) -> Iterator[tuple[int, int, memoryview]]:
        for at in range(0, segment.length, self.chunk):
            yield segment.fd, segment.offset + at, buffer[at : at + self.chunk]


def _read_fully(fd: int, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise ReadFailed(
                f"The disk failed while reading an expert: {error.strerror}. "
                "Check the disk, then the model.",
                Remedy.VERIFY,
            ) from error
        if count == 0:
            raise ReadFailed(
                f"A file of experts ends at byte {offset + done}, {len(buffer) - done} bytes "
                "early. Pack or download the model again."
            )
        done += count
