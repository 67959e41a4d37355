"""Holds this machine to less memory: what a model would do on a smaller one, page cache included.

A control group of Linux (version 2) does it exactly: what is read while this process is in the
group is charged to it, and given up when it is full. Elsewhere a ballast takes memory away, so that
so much is left for everything else. Either is undone on the way out, also after an error or Ctrl-C.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flash_moe.callbacks import Notice, no_notice
from flash_moe.errors import OptionError
from flash_moe.machine import inspect_machine

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
# Beside resident weights and the working set: Python, MLX, the state of a conversation.
BESIDES = 400_000_000
BALLAST_STEP = 64 << 20
# Systems that compress memory must not find anything to compress.
NOISE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Held:
    """`ballast` is the memory that was taken away, if that is how."""

    nbytes: int
    by: Literal["group", "ballast"]
    ballast: int = 0


def require_sense(nbytes: int, needed: int, available: int | None) -> None:
    """OptionError if a model that needs so much cannot run in it, or if it limits nothing."""
    least = needed + BESIDES
    if nbytes < least:
        raise OptionError(
            f"memory={nbytes:,}: choose {_rounded_up(least):,} or more, which this model takes for "
            "its resident weights, its working set and the program itself."
        )
    if available is None:
        raise OptionError("memory: this system does not say how much of it is available.")
    if nbytes >= available:
        raise OptionError(
            f"memory={nbytes:,}: this machine has {available:,} available. Choose less, or set no "
            "limit."
        )


@contextmanager
def held_to(
    nbytes: int | None,
    notice: Notice = no_notice,
    root: Path = CGROUPS,
    own_group: Path = OWN_GROUP,
) -> Iterator[Held | None]:
    """Within, this process has so much memory, and page cache is part of it. Enter before a model
    is loaded: what was there before is not charged. None holds nothing."""
    if nbytes is None:
        yield None
    elif group := _enter(nbytes, root, own_group):
        try:
            yield Held(nbytes, "group")
        finally:
            group.leave()
    else:
        with _ballast(nbytes, notice) as size:
            yield Held(nbytes, "ballast", size)


@dataclass(frozen=True, slots=True)
class _Group:
    """A control group of our own, and the one that this process came from."""

    folder: Path
    origin: Path

    def leave(self) -> None:
        try:
            _move_to(self.origin)
        finally:
            # Pages that it has in the page cache become its parent's.
            self.folder.rmdir()


def _enter(nbytes: int, root: Path, own_group: Path) -> _Group | None:
    """Below the nearest group that lets its children have a limit and may be changed by us."""
    origin = _origin(root, own_group)
    if origin is None:
        return None
    for parent in (origin, *origin.parents):
        if not parent.is_relative_to(root):
            break
        if "memory" in _words(parent / "cgroup.subtree_control"):
            group = _Group(parent / f"flash-moe-{os.getpid()}", origin)
            with suppress(OSError):
                group.folder.mkdir()
                try:
                    (group.folder / "memory.max").write_text(str(nbytes))
                    _move_to(group.folder)
                except BaseException:
                    group.leave()
                    raise
                return group
    return None


def _origin(root: Path, own_group: Path) -> Path | None:
    """This process's group in version 2, which has one line, `0::/path`."""
    with suppress(OSError):
        for line in own_group.read_text().splitlines():
            number, _, path = line.partition("::")
            if number == "0" and (root / "cgroup.controllers").exists():
                return root / path.lstrip("/")
    return None


def _move_to(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _words(file: Path) -> list[str]:
    with suppress(OSError):
        return file.read_text().split()
    return []


@contextmanager
def _ballast(nbytes: int, notice: Notice) -> Iterator[int]:
    """Takes what is available beyond so many bytes, and never more."""
    size = max(0, (inspect_machine().page_cache_bytes or 0) - nbytes)
    noise = os.urandom(NOISE_BYTES) * (BALLAST_STEP // NOISE_BYTES)
    with mmap.mmap(-1, max(size, 1)) as memory:
        for done in range(0, size, BALLAST_STEP):
            notice(f"taking memory away, {done / 1e9:.1f} of {size / 1e9:.1f} GB")
            memory.write(noise[: size - done])
        yield size


def _rounded_up(nbytes: int) -> int:
    """To hundreds of MB, which people can read."""
    return -(-nbytes // 10**8) * 10**8
