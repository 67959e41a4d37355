"""What the operating system counts of a process: bytes fetched from disks, and memory."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

# rusage_info_v2 of macOS: 16 bytes of a UUID, 16 counters, and then bytes read from disks.
RUSAGE_INFO_V2 = 2
RUSAGE_BYTES, DISK_BYTES_READ = 16 + 18 * 8, 16 + 16 * 8


def bytes_from_disk() -> int | None:
    """Since the process began, read-ahead included; None where the system does not tell. What was
    read beyond that came from the page cache."""
    try:
        return _reader()()
    except (OSError, AttributeError, ValueError):
        return None


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    if sys.platform == "linux":
        # getrusage would count what the parent had when it forked.
        with open("/proc/self/status", encoding="ascii") as status:
            peaks = [line.split()[1] for line in status if line.startswith("VmHWM")]
        if peaks:
            return int(peaks[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_memory(pid: int) -> int | None:
    """What a process has in memory now, in bytes; None if it is gone."""
    try:
        if sys.platform == "linux":
            pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")
        command = ["/bin/ps", "-o", "rss=", "-p", str(pid)]
        kilobytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(kilobytes) * 1024
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
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
