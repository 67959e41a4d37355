"""The machine as the operating system describes it: processor, memory, GPU. Needs no MLX."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Of this process's group in a container, whichever version the kernel has.
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# A driver that hangs must not hang us.
TOOL_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` are those that this process may use; `page_cache_bytes` is what the page cache may
    grow to before programs have to give way."""

    cpu: str
    cores: int
    memory_bytes: int
    page_cache_bytes: int | None


@dataclass(frozen=True, slots=True)
class Nvidia:
    """`capability` is None if nvidia-smi does not tell it."""

    driver: tuple[int, ...]
    capability: tuple[int, ...] | None


def inspect_machine() -> Machine:
    return Machine(cpu_name(), usable_cores(), memory_bytes(), available_bytes())


def available_bytes() -> int | None:
    """The memory that this process could use now: free, or page cache; None if nobody says."""
    available = _available()
    return None if available is None else min(memory_bytes(), available)


def memory_bytes() -> int:
    """The memory that this process may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [int(text) for path in MEMORY_LIMITS if (text := _text(path).strip()).isdecimal()]
    return min([memory, *limits])


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def find_nvidia() -> Nvidia | None:
    """An NVIDIA GPU that this process can reach, whether or not MLX can use it."""
    if found := parse_smi(
        _output("nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader")
    ):
        return found
    # A container shares the kernel, and so its driver, with the host, but not always the device.
    reachable = any(Path("/dev").glob("nvidia[0-9]*"))
    driver = parse_driver(_text("/proc/driver/nvidia/version")) if reachable else None
    return Nvidia(driver, None) if driver else None


def parse_smi(text: str) -> Nvidia | None:
    """Of several GPUs the first, which is MLX's; lines are like `570.86.15, 9.0`."""
    match = re.search(r"^(\d+(?:\.\d+)*), (\S+)", text, re.MULTILINE)
    if match is None:
        return None
    capability = _numbers(match[2]) if re.fullmatch(r"\d+\.\d+", match[2]) else None
    return Nvidia(_numbers(match[1]), capability)


def parse_driver(text: str) -> tuple[int, ...] | None:
    """From `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 …`."""
    match = re.search(r"^NVRM version:.*?\s(\d{3,}(?:\.\d+)+)\s", text, re.MULTILINE)
    return _numbers(match[1]) if match else None


def parse_vm_stat(text: str) -> int | None:
    """What macOS can give without swapping: memory that is free or was not used for a while."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)", text, re.MULTILINE)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def is_translated() -> bool:
    """Whether this is a Mac with Apple Silicon that imitates an Intel Mac for us."""
    return _output("/usr/sbin/sysctl", "-n", "sysctl.proc_translated").strip() == "1"


def _available() -> int | None:
    if sys.platform == "darwin":
        return parse_vm_stat(_output("/usr/bin/vm_stat"))
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def cpu_name() -> str:
    if sys.platform == "darwin":
        name = _output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string").strip()
    else:
        match = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
        name = match[1].strip() if match else ""
    return name or platform.machine()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _text(path: str) -> str:
    """Nothing where there is no such file."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """Nothing where there is no such program, or it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TOOL_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
