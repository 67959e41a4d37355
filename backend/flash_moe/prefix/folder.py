"""The folder of saved prompts: which files in it are ours, how large they are, which go first.

A file's time of modification is the time of its last use. Other processes may add and remove files
at any moment, so a missing file is never an error. Needs no MLX.
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

# Part of every name: a version that reads files differently never opens the others'.
VERSION = 1
ABANDONED_SECONDS = 60
_NAME = re.compile(r"v(\d+)-[0-9a-f]{40}\.safetensors")
_TEMPORARY = re.compile(r"\.v\d+-[0-9a-f]{40}\.safetensors\.\d+\.tmp")


@dataclass(frozen=True, slots=True)
class SavedPrompt:
    """`model` says whose state it is (path, K, bits, runtime); empty if the file does not say."""

    path: Path
    nbytes: int
    last_use: float
    tokens: int = 0
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelPrompts:
    """The saved prompts of one model with one K, bits and runtime; no other model can use them.
    `tokens` is the length of the longest, `last_use` that of the most recent."""

    model: dict[str, Any]
    prompts: int
    tokens: int
    nbytes: int
    last_use: float


@dataclass(frozen=True, slots=True)
class PromptFolder:
    path: Path

    def prompts(self) -> list[SavedPrompt]:
        """The most recently used first. Reads only the first few kilobytes of each file."""
        prompts = []
        for file in _files(self.path):
            with suppress(OSError, ValueError, TypeError, RecursionError):
                metadata = read_metadata(file.path)
                tokens = int(metadata.get("tokens", 0))
                model = dict(json.loads(metadata.get("model", "{}")))
                prompts.append(SavedPrompt(file.path, file.nbytes, file.last_use, tokens, model))
        return sorted(prompts, key=lambda prompt: -prompt.last_use)

    def by_model(self) -> list[ModelPrompts]:
        """The most recently used model first."""
        groups: dict[str, list[SavedPrompt]] = {}
        for prompt in self.prompts():
            groups.setdefault(json.dumps(prompt.model, sort_keys=True), []).append(prompt)
        return [
            ModelPrompts(
                group[0].model,
                len(group),
                max(prompt.tokens for prompt in group),
                sum(prompt.nbytes for prompt in group),
                group[0].last_use,
            )
            for group in groups.values()
        ]

    def clear(self, model: str | None = None) -> int:
        """Remove our files and no others, all of them or those of a model's folder; returns the
        bytes freed. OSError if that is forbidden."""
        paths = [*_temporaries(self.path), *(file.path for file in _files(self.path))]
        if model is not None:
            paths = [one.path for one in self.prompts() if one.model.get("path") == model]
        freed = 0
        for path in paths:
            with suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                freed += size
        return freed


def file_name(key: str) -> str:
    return f"v{VERSION}-{key}.safetensors"


def make_room(folder: Path, limit: int) -> None:
    """Remove leftovers and older versions' files, then the least recently used, down to `limit`."""
    for path in _temporaries(folder):
        if _is_abandoned(path):
            path.unlink(missing_ok=True)
    current = []
    for file in _files(folder):
        if _version(file.path) < VERSION:
            file.path.unlink(missing_ok=True)
        else:
            current.append(file)
    total = sum(file.nbytes for file in current)
    for file in sorted(current, key=lambda file: file.last_use):
        if total <= limit:
            return
        file.path.unlink(missing_ok=True)
        total -= file.nbytes


def _files(folder: Path) -> Iterator[SavedPrompt]:
    """Our files, not opened."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield SavedPrompt(path, status.st_size, status.st_mtime)


def _temporaries(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    return []


def _version(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else VERSION


def _is_abandoned(path: Path) -> bool:
    """A process that writes a file holds its lock, and loses it when it dies. A new file is not
    locked yet for a moment: two processes that wrote at once hit that moment once in ten runs."""
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
