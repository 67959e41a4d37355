"""The folder of kept prompts: which files are ours, how many bytes they take, which go first.

A file's time of modification is when it was last used. Other processes may add and remove files
at any moment, so a file that is gone is never an error. Needs no MLX.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash_moe.format.sealed import read_metadata

# Part of every name: a version that reads others' files differently never opens them.
VERSION = 1
ABANDONED_SECONDS = 60
_NAME = re.compile(r"v(\d+)-[0-9a-f]{40}\.safetensors")
_TEMPORARY = re.compile(r"\.v\d+-[0-9a-f]{40}\.safetensors\.\d+\.tmp")


@dataclass(frozen=True, slots=True)
class Entry:
    """A kept prompt. `model` says whose: path, K, bits, runtime; empty if the file does not."""

    path: Path
    nbytes: int
    last_use: float
    tokens: int = 0
    model: dict[str, Any] = field(default_factory=dict)


def file_name(key: str) -> str:
    return f"v{VERSION}-{key}.safetensors"


def entries(folder: Path) -> list[Entry]:
    """What is kept, the last used first, from the files' first few kilobytes."""
    found = []
    for entry in _entries(folder):
        with suppress(OSError, ValueError, TypeError, RecursionError):
            metadata = read_metadata(entry.path)
            model = json.loads(metadata.get("model", "{}"))
            tokens = int(metadata.get("tokens", 0))
            found.append(Entry(entry.path, entry.nbytes, entry.last_use, tokens, dict(model)))
    return sorted(found, key=lambda entry: -entry.last_use)


def clear(folder: Path) -> int:
    """Remove what is ours and nothing else; how many bytes that freed. OSError if it may not."""
    freed = 0
    for path in [*_temporaries(folder), *(entry.path for entry in _entries(folder))]:
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


def make_room(folder: Path, limit: int) -> None:
    """Remove leftovers and older versions' files, then the least recently used, down to `limit`."""
    for path in _temporaries(folder):
        if _is_abandoned(path):
            path.unlink(missing_ok=True)
    kept = []
    for entry in _entries(folder):
        if _version(entry.path) < VERSION:
            entry.path.unlink(missing_ok=True)
        else:
            kept.append(entry)
    total = sum(entry.nbytes for entry in kept)
    for entry in sorted(kept, key=lambda entry: entry.last_use):
        if total <= limit:
            return
        entry.path.unlink(missing_ok=True)
        total -= entry.nbytes


def _entries(folder: Path) -> Iterator[Entry]:
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    found = path.stat()
                    yield Entry(path, found.st_size, found.st_mtime)


def _temporaries(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    return []


def _version(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else VERSION


def _is_abandoned(path: Path) -> bool:
    """Who writes a file holds its lock, and loses it when it dies. A new file has none yet for a
    moment: two processes that wrote at once met in that moment once in ten runs."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return time.time() - os.fstat(fd).st_mtime > ABANDONED_SECONDS
    except OSError:
        return False
    finally:
        os.close(fd)
