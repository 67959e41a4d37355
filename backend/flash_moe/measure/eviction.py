"""Takes a model's experts out of the page cache, so that what the disk gives can be measured."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

from flash_moe.process import bytes_from_disk
from flash_moe.stream.residency import Residency
from flash_moe.stream.streamed import Streamer

NO_CALL = "this system drops nothing from its page cache on request"
KEPT = "this file system keeps in memory what it is asked to drop"


class Eviction:
    """Call it to evict. `why_not` says, for people, why that is not possible here; None if it is.
    Found out by trying: some file systems take the request and ignore it."""

    def __init__(self, streamer: Streamer) -> None:
        self._streamer = streamer
        runs = [run for layer in streamer.store.layers for run in layer.runs]
        self._files = sorted({file for run in runs for file in run.files or (run.file,)})
        self.why_not = self._find_fault()

    def __call__(self) -> None:
        self._streamer.bank.drain()
        if self._streamer.mapping is not None:
            self._streamer.mapping.give_up_all()
        for file in self._files:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _write_out(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def _find_fault(self) -> str | None:
        if not hasattr(os, "posix_fadvise"):
            return NO_CALL
        self()
        # Linux calls cached what belongs to another user, so that is asked in a second way.
        gone = not Residency(self._streamer.store).cached(0, 0) or self._comes_from_the_disk()
        return None if gone else KEPT

    def _comes_from_the_disk(self) -> bool:
        before = bytes_from_disk()
        for file, offset, length, _ in self._streamer.store.pieces(0, [0]).tolist():
            os.pread(file, length, offset)
        after = bytes_from_disk()
        return before is not None and after is not None and after > before


def _write_out(fd: int) -> None:
    """What is still to be written would stay. fsync writes it, too, but has the disk empty its own
    cache as well, each time, and behind a virtual disk that may be minutes of its host's."""
    call = _sync_file_range()
    wait_write_wait, everything = 7, ctypes.c_int64(0)
    if call is None or call(fd, everything, everything, wait_write_wait):
        os.fsync(fd)


@cache
def _sync_file_range() -> Any:
    """Linux has it, Python does not."""
    return getattr(ctypes.CDLL(None), "sync_file_range", None)
