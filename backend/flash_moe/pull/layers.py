"""Files of records while they are provisional, and their sealing.

Until every shard that has something of a layer agrees with its hash, its records lie under a
temporary name. Then they are read back, their checksums are written, and they are of the pack.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flash_moe.errors import CheckpointError
from flash_moe.format.atomic import flush, sync, write_json
from flash_moe.pack.files import LayerPlace
from flash_moe.pack.records import read_back
from flash_moe.pull.route import Route
from flash_moe.pull.spans import Position


@dataclass(slots=True)
class Layers:
    """Owns the descriptors of provisional files, and the thread that reads finished ones back;
    `close` ends both."""

    workspace: Path
    route: Route
    _open: dict[int, int] = field(default_factory=dict)
    _touched: set[int] = field(default_factory=set)
    _sealing: dict[int, Future[None]] = field(default_factory=dict)
    _sealer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def descriptor(self, number: int) -> int:
        """To write records of a layer to."""
        if number not in self._open:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._open[number] = os.open(self._part(number), flags, 0o666)
            os.ftruncate(self._open[number], self._size(number))
        self._touched.add(number)
        return self._open[number]

    def sync(self) -> None:
        for number in self._touched & self._open.keys():
            flush(self._open[number])
        self._touched.clear()

    def sealed(self) -> frozenset[int]:
        return frozenset(
            number
            for number in range(len(self.route.layers))
            if self._place(number).is_done(self._size(number))
        )

    def seal(self, shard: int) -> None:
        """Layers that end before a shard, all others before it agreeing with their hashes."""
        sealed = self.sealed()
        for number, (_, last) in enumerate(self.route.extent):
            if last < shard and number not in sealed and number not in self._sealing:
                if (fd := self._open.pop(number, None)) is not None:
                    os.close(fd)
                self._sealing[number] = self._sealer.submit(self._seal, number)

    def wait(self) -> None:
        for sealing in self._sealing.values():
            sealing.result()

    def require(self, position: Position) -> None:
        """What was written before a position is there: a file made anew, or made as long again,
        would hold zeros."""
        sealed = self.sealed()
        for number, first in enumerate(self.route.first_piece):
            files = (self._part(number), self._place(number).file)
            if number in sealed or first > position:
                continue
            if not any(f.exists() and f.stat().st_size == self._size(number) for f in files):
                raise CheckpointError(
                    f"{files[0]} is gone or cut. Remove {self.workspace}, and pull again."
                )

    def require_all(self) -> None:
        if missing := set(range(len(self.route.layers))) - self.sealed():
            raise CheckpointError(
                f"{len(missing)} layers are missing from {self.workspace}. Remove it, and pull "
                "again."
            )

    def close(self) -> None:
        self._sealer.shutdown(cancel_futures=True)
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def _place(self, number: int) -> LayerPlace:
        return LayerPlace(self.workspace, number)

    def _part(self, number: int) -> Path:
        return self.workspace / f"layer_{number:03}.part"

    def _size(self, number: int) -> int:
        return self.route.layers[number].experts * self.route.layouts[number].stride

    def _seal(self, number: int) -> None:
        place, part = self._place(number), self._part(number)
        place.file.parent.mkdir(exist_ok=True)
        if part.exists():
            part.rename(place.file)
            sync(place.file.parent)
        checksums = read_back(place.file, self.route.layouts[number])
        write_json(place.done, checksums._asdict())
