"""Tiny snapshots, and the folder that they are saved in."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.state import Snapshot

KEY, OTHER = "0" * 40, "1" * 40
IDS, ENDS = (5, 6, 7), (2, 3)
PROMPT = [*range(10, 100), 1, 2, 7]


def small(tokens: tuple[int, ...] = IDS, ends: tuple[int, ...] = ENDS, size: int = 20) -> Snapshot:
    array = mx.arange(size, dtype=mx.float32).reshape(1, -1)
    return Snapshot(tokens, ends, [{"class": "KVCache", "fields": {"keys": {"array": 0}}}], [array])


def snapshots(folder: Path, limit: int = 1 << 20, scope: str = "scope") -> DiskSnapshots:
    return DiskSnapshots(folder, limit, scope, {"path": "/a", "experts_per_token": 4})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
