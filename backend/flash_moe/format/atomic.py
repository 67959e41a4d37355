"""Write files so that a crash at any moment leaves the old one or the new one, never a half."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flash_moe.errors import CheckpointError, OptionError


def require_target(path: Path | None) -> Path | None:
    """Where a file is to be written, checked before hours are spent on its content."""
    if path is None:
        return None
    path = path.resolve()
    if path.is_dir():
        raise OptionError(f"{path} is a folder: choose another place for the file.")
    if not path.parent.is_dir():
        raise OptionError(f"Cannot write {path}: its folder does not exist.")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and takes its name."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path, busy: str) -> Iterator[None]:
    """A folder for one process at a time; CheckpointError, which begins with `busy`, for another.
    The lock is on the folder itself, so that no lock file is left behind. Whoever waited for it
    must look again, because the winner removes or renames the folder when it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            still_there = os.path.samestat(os.fstat(fd), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            still_there = False
        if not still_there:
            raise CheckpointError(f"{busy} Wait until it is done, or choose another target.")
        yield
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        # Paths that are not UTF-8 come as lone surrogates; `json.loads` reads them back.
        temporary.write_bytes(text.encode("utf-8", "surrogatepass"))


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of it: one call may write less."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        flush(fd)
    finally:
        os.close(fd)


def flush(fd: int) -> None:
    """To the disk itself. macOS's fsync leaves it in the disk's own cache, which may write what
    came later first."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # of file systems that do not have it, as those of networks
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)
