"""Files with holes: as long as they claim, and as large on disk as what was written into them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from functools import cache
from pathlib import Path

# Holes are made of whole blocks; no file system here has larger ones.
BLOCK = 4096
PROBE_BYTES = 16 << 20
# Of Linux's fallocate: KEEP_SIZE | PUNCH_HOLE. Of macOS's fcntl: F_PUNCHHOLE.
_PUNCH_ON_LINUX = 0x03
_PUNCH_ON_MACOS = 99


def allocated(path: Path) -> int:
    """What a file, or all that is in a folder, takes on disk."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(allocated(inside) for inside in path.iterdir())
        return path.lstat().st_blocks * 512
    except FileNotFoundError:  # another process has just removed or renamed it
        return 0


def punch(fd: int, start: int, end: int) -> None:
    """Give the blocks that lie wholly between back to the disk; they read as zeros then."""
    start, end = -(-start // BLOCK) * BLOCK, end // BLOCK * BLOCK
    if start >= end:
        return
    if sys.platform == "darwin":
        fcntl.fcntl(fd, _PUNCH_ON_MACOS, struct.pack("=IIqq", 0, 0, start, end - start))
        return
    if _fallocate()(fd, _PUNCH_ON_LINUX, start, end - start):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def holes_are_possible(folder: Path) -> bool:
    """Whether the file system of a folder has them: exFAT and FAT do not."""
    probe = folder / f".holes-{os.getpid()}"
    fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, PROBE_BYTES)
        os.pwrite(fd, b"x" * BLOCK, 0)
        punch(fd, 0, BLOCK)
        return os.fstat(fd).st_blocks * 512 < PROBE_BYTES // 2
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    finally:
        os.close(fd)
        probe.unlink()


@cache
def _fallocate() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function
