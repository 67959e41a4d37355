"""What the machine could do: raw reads of as many records as a token has, and copies of memory.

The engine's own reader reads them, so a token's reading cannot be faster; whatever it is slower by
is the engine's. Disks of rented machines change by half from run to run: compare within one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flash_moe.callbacks import Notice, no_notice
from flash_moe.errors import ReadFailed
from flash_moe.measure.eviction import Eviction
from flash_moe.model.load import StreamedModel
from flash_moe.stream.precision import Flags
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import AT, FILE, LENGTH, OFFSET, ExpertStore, Pieces

# What O_DIRECT takes: whole pages, on page boundaries.
PAGE = 4096
# Tokens' worth of records; the first round is not counted, which touches the buffer.
ROUNDS = 5
COPY_BYTES = 256_000_000


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bytes a second. `direct` and `cold` are from the disk, past the page cache and through it;
    `cached` from the page cache. None: not measured here."""

    direct: float | None
    cold: float | None
    cached: float
    copy: float
    device_copy: float | None = None

    @property
    def disk(self) -> float | None:
        """The better way to read from the disk."""
        return max((rate for rate in (self.direct, self.cold) if rate), default=None)

    def seconds(self, from_disk: float, from_cache: float) -> float | None:
        """What raw reads of so many bytes take; None where that was not measured."""
        if not from_disk:
            return from_cache / self.cached
        return None if self.disk is None else from_disk / self.disk + from_cache / self.cached


def measure_roofline(
    model: StreamedModel, evict: Eviction, copy: float, notice: Notice = no_notice
) -> Roofline:
    """`copy` is measured before, when there is still memory for it."""
    raw = RawReads.of(model)
    try:
        notice("raw reads past the page cache")
        direct = raw.direct()
        notice("raw reads through the page cache")
        cold = None if evict.why_not else raw.rate(evict)
        return Roofline(direct, cold, raw.rate(), copy, device_copy())
    finally:
        raw.close()


class RawReads:
    """Reads of each layer's experts, one layer after the other, as a token's are."""

    def __init__(
        self, store: ExpertStore, k: int, reader: Reader | None = None, full: Flags | None = None
    ) -> None:
        self._store, self._k, self._full = store, k, full
        self._reader = reader or Reader()
        self._dice = random.Random(0)
        self._past: dict[int, int] = {}

    @classmethod
    def of(cls, model: StreamedModel) -> RawReads:
        """With a reader like the model's."""
        own, choice = model.streamer.reader, model.choice
        full = choice.precision.full_ranks(choice.k, "reply") if choice.precision.by_rank else None
        reader = Reader(own.threads, own.chunk, own.native is not None)
        return cls(model.streamer.store, choice.k, reader, full)

    def rate(self, before: Callable[[], None] | None = None) -> float:
        """Through the page cache: other records each time after `before`, without it the same."""
        fixed = None if before else self._token()
        return self._median(lambda: fixed or self._token(), before=before)

    def direct(self) -> float | None:
        """Past it; None where the file system cannot."""
        try:
            return self._median(self._token, self._whole_pages)
        except (OSError, ReadFailed):
            return None

    def close(self) -> None:
        self._reader.close()
        for fd in self._past.values():
            os.close(fd)
        self._past.clear()

    def _median(
        self,
        choose: Callable[[], list[Pieces]],
        widen: Callable[[Pieces], Pieces] = lambda pieces: pieces,
        before: Callable[[], None] | None = None,
    ) -> float:
        """Bytes of records a second; what reads are widened by does not count."""
        rates, buffer = [], memoryview(b"")
        for _ in range(ROUNDS):
            if before is not None:
                before()
            records = choose()
            layers = [widen(pieces) for pieces in records]
            needed = max(_lay_out(pieces) for pieces in layers)
            if needed > len(buffer):
                buffer = memoryview(mmap.mmap(-1, needed))
            start = time.perf_counter()
            for pieces in layers:
                self._reader.read(pieces, buffer)
            seconds = time.perf_counter() - start
            rates.append(sum(int(pieces[:, LENGTH].sum()) for pieces in records) / seconds)
        return statistics.median(rates[1:])

    def _token(self) -> list[Pieces]:
        """As many records of each layer as a token has, with the planes that it reads of them."""
        return [
            self._store.pieces(
                number, self._dice.sample(range(layer.experts), self._k), full=self._full
            )
            for number, layer in enumerate(self._store.layers)
        ]

    def _whole_pages(self, pieces: Pieces) -> Pieces:
        """The pages that they lie in, of files that are open a second time. The last page of a
        file that ends within it is left out."""
        wide = pieces.copy()
        for fd in {int(fd) for fd in pieces[:, FILE]} - self._past.keys():
            self._past[fd] = _open_past_the_cache(fd)
        sizes = [os.fstat(int(fd)).st_size // PAGE * PAGE for fd in pieces[:, FILE]]
        ends = -(-(pieces[:, OFFSET] + pieces[:, LENGTH]) // PAGE) * PAGE
        wide[:, FILE] = [self._past[int(fd)] for fd in pieces[:, FILE]]
        wide[:, OFFSET] = pieces[:, OFFSET] // PAGE * PAGE
        wide[:, LENGTH] = np.maximum(np.minimum(ends, sizes) - wide[:, OFFSET], 0)
        return wide


def memory_copy() -> float:
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    return _copy_rate(lambda: np.copyto(target, source))


def device_copy() -> float | None:
    """On the GPU that MLX uses; None where it uses none."""
    if mx.default_device() != mx.gpu:
        return None
    source = mx.ones((COPY_BYTES // 4,), mx.uint32)
    return _copy_rate(lambda: mx.eval(source + 1))


def _copy_rate(copy: Callable[[], None]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return COPY_BYTES / statistics.median(seconds[1:])


def _lay_out(pieces: Pieces) -> int:
    """Places in a buffer, each on a page boundary; what they take together."""
    sizes = -(-pieces[:, LENGTH] // PAGE) * PAGE
    pieces[:, AT] = np.cumsum(sizes) - sizes
    return int(sizes.sum())


def _open_past_the_cache(fd: int) -> int:
    """macOS has no O_DIRECT; there, pages that are cached already are still taken from there."""
    if sys.platform == "darwin":
        path = fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")
        again = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.fcntl(again, fcntl.F_NOCACHE, 1)
        return again
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
