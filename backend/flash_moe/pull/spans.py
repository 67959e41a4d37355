"""Parts of a shard by what becomes of them, and how they are grouped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

# What is handed over at once, except pieces that are larger.
BATCH_BYTES = 8 << 20


class Piece(NamedTuple):
    """One part of one expert, between two bytes of a shard."""

    start: int
    end: int
    layer: int
    expert: int
    part: int


class Use(Enum):
    HEADER = auto()
    KEPT = auto()
    UNUSED = auto()
    PIECE = auto()


class Span(NamedTuple):
    start: int
    end: int
    use: Use
    piece: Piece | None = None


@dataclass(slots=True)
class Batch:
    """Bytes of one shard. `here`: from the sparse copy. `ahead`: a tensor that a piece waits for,
    fetched out of order, hashed when its turn comes."""

    shard: str
    start: int
    end: int
    spans: list[Span]
    here: bool = False
    ahead: str | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


# How far a pull is: a shard by its number, and a byte in it.
Position = tuple[int, int]


def parts(start: int, end: int, use: Use) -> Iterator[Span]:
    """Bytes of one use, a batch at a time."""
    for at in range(start, end, BATCH_BYTES):
        yield Span(at, min(at + BATCH_BYTES, end), use)


def grouped(shard: str, spans: list[Span]) -> Batch:
    return Batch(shard, spans[0].start, spans[-1].end, spans)
