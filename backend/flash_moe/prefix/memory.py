"""Snapshots in memory, up to a number of bytes; the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from flash_moe.prefix.state import Snapshot


class MemorySnapshots:
    """Iterates over its (key, snapshot) pairs, the least recently used first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._snapshots: OrderedDict[str, Snapshot] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[tuple[str, Snapshot]]:
        return iter(self._snapshots.items())

    def get(self, key: str) -> Snapshot | None:
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
        return self._snapshots.get(key)

    def put(self, key: str, snapshot: Snapshot) -> None:
        """A snapshot larger than the limit is not stored, and evicts nothing."""
        self.remove(key)
        if snapshot.nbytes > self._limit:
            return
        while self.nbytes + snapshot.nbytes > self._limit:
            self.remove(next(iter(self._snapshots)))
        self._snapshots[key] = snapshot
        self.nbytes += snapshot.nbytes

    def remove(self, key: str) -> None:
        if old := self._snapshots.pop(key, None):
            self.nbytes -= old.nbytes

    def clear(self) -> None:
        self._snapshots.clear()
        self.nbytes = 0
