"""What a fused expert kernel must know about a record: where gate, up and down lie in it, and how
they are packed. Everything is plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_TYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection of one expert: `rows × columns`, affine, its parts at byte offsets."""

    rows: int
    columns: int
    bits: int
    group_size: int
    scale_type: str
    weight: int
    scales: int
    biases: int


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
