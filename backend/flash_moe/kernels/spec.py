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

    def __post_init__(self) -> None:
        matrices = (self.gate, self.up, self.down)
        if len({matrix.rest is None for matrix in matrices}) > 1:
            raise ValueError("some matrices of a record have a second plane and some have none")
        if self.split and any(matrix.bits != 2 for matrix in matrices):
            raise ValueError("a matrix in two planes has a first plane that is not of 2 bits")

    @property
    def split(self) -> bool:
        """Whether records lie in two planes, so that a pair has a choice."""
        return self.gate.rest is not None

    def check_choice(self, largest: int) -> None:
        """Of all slot numbers of a call the largest, which is where WHOLE shows."""
        if largest >= WHOLE and not self.split:
            raise ValueError(
                f"slot {largest - WHOLE} is to be computed from two planes: it has one"
            )

    @property
    def hidden(self) -> int:
        return self.gate.columns

    @property
    def intermediate(self) -> int:
        return self.gate.rows
