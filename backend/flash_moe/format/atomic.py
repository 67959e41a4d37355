"""Write files so that a crash at any moment leaves the old one or the new one, never a half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flash_moe.errors import OptionError


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


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        # Paths that are not UTF-8 come as lone surrogates; `json.loads` reads them back.
        temporary.write_bytes(text.encode("utf-8", "surrogatepass"))


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
