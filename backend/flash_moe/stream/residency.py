"""Whether an expert is in the page cache, asked of the operating system.

A few pages of a record stand for all: records are read whole, and a question for all pages of one
of 3.9 MB takes 59 µs, for four of them 6.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from flash_moe.stream.store import ExpertStore

PROBES = 4


@dataclass(slots=True)
class Residency:
    """Maps the store's files, which reads nothing. Linux answers only the owner of a file: one that
    belongs to another user counts as cached."""

    store: ExpertStore
    _maps: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def cached(self, layer: int, expert: int, full: bool = True) -> bool:
        """Whether what would be read of an expert is there."""
        pieces = self.store.pieces(layer, [expert], full=np.array([full]))
        return all(self._in_memory(*piece[:3]) for piece in pieces.tolist())

    def _in_memory(self, fd: int, offset: int, length: int) -> bool:
        mapped = self._mapped(fd)
        last = (offset + length - 1) // mmap.PAGESIZE
        first = offset // mmap.PAGESIZE
        pages = {first + (last - first) * probe // (PROBES - 1) for probe in range(PROBES)}
        return all(_resident(mapped, page) for page in pages)

    def _mapped(self, fd: int) -> npt.NDArray[np.uint8]:
        if fd not in self._maps:
            view = mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
            self._maps[fd] = np.frombuffer(view, np.uint8)
        return self._maps[fd]


def _resident(mapped: npt.NDArray[np.uint8], page: int) -> bool:
    answer = ctypes.c_ubyte()
    at = mapped.ctypes.data + page * mmap.PAGESIZE
    return _mincore()(at, 1, ctypes.byref(answer)) == 0 and bool(answer.value & 1)


@cache
def _mincore() -> ctypes._NamedFuncPointer:
    library = ctypes.CDLL(None)
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library.mincore
