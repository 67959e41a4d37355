"""What a fused expert kernel must know about a record: where gate, up and down lie in it, and how
they are packed. Everything is plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_TYPES = ("bfloat16", "float16", "float32")
# Set in a pair's slot number: the pair is computed from both planes of its record.
WHOLE = 1 << 31


@dataclass(frozen=True, slots=True)
class Rest:
    """The second plane of a matrix: the low two bits of 4-bit codes, whose high two bits are the
    first plane, and the scales and biases of the 4-bit weights."""

    weight: int
    scales: int
    biases: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection of one expert: `rows × columns`, affine, its parts at byte offsets. Where it
    has a rest these are the first plane's, which can be computed from alone."""

    rows: int
    columns: int
    bits: int
    group_size: int
    scale_type: str
    weight: int
    scales: int
    biases: int
    rest: Rest | None = None


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """down(silu(gate(x)) * up(x)), three matrices in a record; `stride` bytes between slots."""

    gate: Matrix
    up: Matrix
    down: Matrix
    stride: int

    @property
    def hidden(self) -> int:
        return self.gate.columns

    @property
    def intermediate(self) -> int:
        return self.gate.rows
