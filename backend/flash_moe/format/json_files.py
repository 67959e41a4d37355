"""JSON from files that nobody should trust: objects, and lists of lines."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flash_moe.errors import CheckpointError, OptionError, Remedy

MAX_JSON_BYTES = 64_000_000
# Of templates, and of texts to calibrate with and to judge by.
MAX_TEXT_BYTES = 1_000_000_000

Item = TypeVar("Item")


def require_file(path: Path, most: int, remedy: Remedy | None = None) -> None:
    """CheckpointError for what a read would not end of: a device, a pipe, a file too large."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.", remedy) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"Cannot read {path}: it is not a regular file.", remedy)
    if status.st_size > most:
        raise CheckpointError(f"{path} is too large to be what its name says.", remedy)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    require_file(path, MAX_JSON_BYTES)
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object. Download it again.")
    return value


def read_json_if_present(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def read_text(path: Path, remedy: Remedy | None = None) -> str:
    require_file(path, MAX_TEXT_BYTES, remedy)
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.", remedy) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error.reason}.", remedy) from error


def parse_lines(
    path: Path, text: str, parse: Callable[[Any], Item], remedy: Remedy | None = None
) -> list[Item]:
    """Each line of `text`, which `path` holds, as JSON and parsed; empty lines are skipped."""
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                items.append(parse(json.loads(line)))
            except (OptionError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}, line {number}: {_reason(error)}. Correct the line, or leave it out.",
                    remedy,
                ) from error
    return items


def _reason(error: Exception) -> str:
    text = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return text.rstrip(".")
