"""The reader in C, typed. `Reader.read` checks that no piece leaves its buffer."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt

from flash_moe.kernels.spec import U64
from flash_moe.native.build import build
from flash_moe.native.libraries import READER
from flash_moe.stream.store import Pieces


class NativeReader:
    """The reading threads of one compiled library, shared by all who use it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_uint64
        library.flash_read.argtypes = [pointer, number, pointer, number, ctypes.c_int, pointer]
        library.flash_read.restype = ctypes.c_int64
        library.flash_in_memory.argtypes = [pointer, number, number, pointer, pointer]
        library.flash_in_memory.restype = None
        self._library = library

    def read(self, pieces: Pieces, into: memoryview, task: int, threads: int) -> tuple[int, int]:
        """Tasks of `task` bytes. (0, 0), or errno (-1: a file ends early) and the piece."""
        buffer = np.frombuffer(into, np.uint8)
        failed = ctypes.c_int64()
        error = self._library.flash_read(
            pieces.ctypes.data,
            len(pieces),
            buffer.ctypes.data,
            task,
            threads,
            ctypes.byref(failed),
        )
        return error, failed.value

    def in_memory(self, pieces: Pieces, maps: U64) -> npt.NDArray[np.bool_]:
        """For pieces [experts, pieces, 4]: which experts are wholly in the page cache. `maps` has
        the address and length of each open file."""
        experts, per, _ = pieces.shape
        there = np.empty(experts, np.bool_)
        self._library.flash_in_memory(
            pieces.ctypes.data, experts, per, maps.ctypes.data, there.ctypes.data
        )
        return there


@cache
def load_native_reader() -> NativeReader:
    """Where the package has none, compiled on the first use on a machine, a second long. Raises
    NativeUnavailable."""
    return NativeReader(build(READER))
