"""What this process had to fetch from disks: the rest of what it read was in the page cache."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

# rusage_info_v2 of macOS: 16 bytes of a UUID, 16 counters, and then bytes read from disks.
RUSAGE_INFO_V2 = 2
RUSAGE_BYTES, DISK_BYTES_READ = 16 + 18 * 8, 16 + 16 * 8


def bytes_from_disk() -> int | None:
    """Since the process began, read-ahead included; None where the system does not tell."""
    try:
        return _reader()()
    except (OSError, AttributeError, ValueError):
        return None


@cache
def _reader() -> Callable[[], int | None]:
    return _macos if sys.platform == "darwin" else _linux


def _linux() -> int | None:
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "read_bytes":
            return int(value)
    return None


def _macos() -> int | None:
    buffer = ctypes.create_string_buffer(RUSAGE_BYTES)
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V2, buffer):
        return None
    return int.from_bytes(buffer.raw[DISK_BYTES_READ : DISK_BYTES_READ + 8], sys.byteorder)
