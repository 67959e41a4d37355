"""A sparse copy of a repository: real headers and configs, and of the weights only what is kept.

To everything that opens checkpoints it is a folder like any other; its holes read as zeros.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flash_moe.errors import CheckpointError
from flash_moe.format.atomic import flush, replacing, sync, write_at
from flash_moe.format.holes import punch
from flash_moe.format.safetensors import MAX_HEADER_BYTES
from flash_moe.pull.ranges import Ranges
from flash_moe.pull.repository import INDEX, PLANNED, RemoteFile, Repository
from flash_moe.pull.route import Route
from flash_moe.pull.stream import CONNECTIONS

LENGTH_BYTES = 8


@dataclass(slots=True)
class Shadow:
    """Owns the descriptors of the shards it has touched; `close` frees them."""

    path: Path
    _open: dict[str, int] = field(default_factory=dict)
    _written: set[str] = field(default_factory=set)

    def write(self, name: str, data: memoryview, offset: int) -> None:
        write_at(self._file(name), data, offset)
        self._written.add(name)

    def read(self, name: str, start: int, end: int) -> bytearray:
        data = bytearray(end - start)
        view, fd = memoryview(data), self._file(name)
        while view:
            got = os.preadv(fd, [view], end - len(view))
            if not got:
                raise CheckpointError(f"{self.path / name} ends early. Remove it and begin again.")
            view = view[got:]
        return data

    def punch(self, name: str, start: int, end: int) -> None:
        punch(self._file(name), start, end)

    def sync(self) -> None:
        for name in self._written:
            flush(self._file(name))
        self._written.clear()

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def _file(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self.path / name, os.O_RDWR | os.O_CLOEXEC)
        return self._open[name]


# The beginnings of shards, and the whole of small files.
Contents = dict[str, bytes]


def fetch_plan(ranges: Ranges) -> Contents:
    """What says what a model is: its configs, and the headers of its weights."""
    repository = ranges.repository
    contents = {file.name: ranges.whole(file) for file in repository.small if file.name in PLANNED}
    _require_all_shards(repository, contents.get(INDEX))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            headers = list(pool.map(lambda file: _header(ranges, file), repository.weights))
        except BaseException:
            ranges.stop()  # or the others are waited for
            raise
    if sum(map(len, headers)) > MAX_HEADER_BYTES:
        raise CheckpointError(f"The headers of {repository.name} are too large to be headers.")
    return contents | {
        file.name: header for file, header in zip(repository.weights, headers, strict=True)
    }


def _require_all_shards(repository: Repository, index: bytes | None) -> None:
    try:
        named = set(json.loads(index or b"{}").get("weight_map", {}).values())
    except (ValueError, AttributeError, TypeError, RecursionError):
        return  # whoever reads it next says what is wrong with it
    if missing := named - {file.name for file in repository.weights}:
        raise CheckpointError(
            f"{repository.name} lacks {len(missing)} of the {len(named)} weight files that its own "
            "index names: it is being uploaded, or broken. Choose another repository or revision."
        )


def _header(ranges: Ranges, file: RemoteFile) -> bytes:
    """With its own length before it, as it stands in the file."""
    if file.size < LENGTH_BYTES:
        raise CheckpointError(f"{file.name} is too short to be a safetensors file.")
    start = bytearray(LENGTH_BYTES)
    ranges.fill(file, 0, memoryview(start))
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER_BYTES, file.size - LENGTH_BYTES):
        raise CheckpointError(
            f"{file.name} is not a sound safetensors file: its header claims {length} bytes of a "
            f"file of {file.size}."
        )
    rest = bytearray(length)
    ranges.fill(file, LENGTH_BYTES, memoryview(rest))
    return bytes(start + rest)


def make_shadow(folder: Path, repository: Repository, contents: Mapping[str, bytes]) -> Path:
    """Write what is known."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {file.name: file.size for file in repository.weights}
    for name, data in contents.items():
        path = folder / name
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(data)
            if name in sizes:
                file.truncate(sizes[name])
    sync(folder)
    return folder


class Release:
    """Gives a copy's blocks back when the pack has all resident weights that are made of them."""

    def __init__(self, shadow: Shadow, route: Route) -> None:
        self._shadow, self._route = shadow, route
        self._waiting = dict(route.resident)

    def __call__(self, names: list[str]) -> None:
        done = frozenset().union(*(self._waiting.pop(name) for name in names))
        for name in done.difference(*self._waiting.values()) if self._waiting else done:
            tensor = self._route.tensors[name]
            end = tensor.offset + tensor.nbytes
            self._shadow.punch(tensor.file.name, tensor.offset, end)
