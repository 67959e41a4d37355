"""What a kernel must know about an expert's record: where gate, up and down lie in it, and how
they are packed. Everything is plain numbers.

A pair is one token and one of its experts. In a call, a pair's slot number says which record of
the bank it is computed from; with FULL set, from both planes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flash_moe.format.layout import AFFINE, PLANE_BITS, SECOND_PLANE, Layout

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_TYPES = ("bfloat16", "float16", "float32")
# What the router kernels take: experts of a layer, and how many of them for a token.
MAX_EXPERTS, MAX_CHOSEN = 1024, 32

FULL = 1 << 31
SLOT_MASK = np.uint32(FULL - 1)


@dataclass(frozen=True, slots=True)
class SecondPlane:
    """The low two bits of 4-bit codes, and the scales and biases of the 4-bit weights."""

    weight: int
    scales: int
    biases: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection of one expert: `rows × columns`, affine, its parts at byte offsets. Where
    there is a second plane these are the first one's, a 2-bit matrix of its own."""

    rows: int
    columns: int
    bits: int
    group_size: int
    scale_type: str
    weight: int
    scales: int
    biases: int
    second: SecondPlane | None = None


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """down(silu(gate(x)) * up(x)), three matrices in a record; `stride` bytes between slots."""

    gate: Matrix
    up: Matrix
    down: Matrix
    stride: int

    def __post_init__(self) -> None:
        matrices = (self.gate, self.up, self.down)
        if len({matrix.second is None for matrix in matrices}) > 1:
            raise ValueError("some matrices of a record have a second plane and some have none")
        if self.two_planes and any(matrix.bits != 2 for matrix in matrices):
            raise ValueError("a matrix in two planes has a first plane that is not of 2 bits")

    @property
    def two_planes(self) -> bool:
        return self.gate.second is not None

    def check_slots(self, largest: int) -> None:
        """ValueError, if the largest slot number of a call asks for a plane that is not there."""
        if largest >= FULL and not self.two_planes:
            raise ValueError(f"slot {largest - FULL} is to be computed from two planes: it has one")

    @property
    def hidden(self) -> int:
        return self.gate.columns

    @property
    def intermediate(self) -> int:
        return self.gate.rows


@cache
def part_offsets(spec: ExpertSpec) -> U64:
    """Where the parts of a record begin: weight, scales and biases of gate, up and down; then those
    of the second planes, if there are any."""
    matrices = (spec.gate, spec.up, spec.down)
    planes: list[Matrix | SecondPlane] = [*matrices, *(m.second for m in matrices if m.second)]
    parts = [(plane.weight, plane.scales, plane.biases) for plane in planes]
    return np.array(parts, np.uint64).reshape(-1)


def part_addresses(spec: ExpertSpec, address: int, slots: int) -> U64:
    """Of records that lie one after the other, [slots, parts]."""
    starts = address + spec.stride * np.arange(slots, dtype=np.uint64)
    return starts[:, None] + part_offsets(spec)


def inverse(order: npt.NDArray[Any]) -> U32:
    """Where each element of a permuted sequence has gone."""
    place = np.empty(len(order), np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    return place


def expert_spec(layout: Layout, stride: int) -> ExpertSpec:
    """The spec of a record of a SwitchGLU, affine."""
    gate, up, down = (_matrix(layout, f"{name}_proj") for name in ("gate", "up", "down"))
    return ExpertSpec(gate, up, down, stride)


def _matrix(layout: Layout, projection: str) -> Matrix:
    quantization = dict(layout.quantization)[projection]
    assert quantization is not None
    parts = {part.name: part for part in layout.parts}
    weight, scales, biases = (parts[f"{projection}.{param}"] for param in AFFINE)
    rows, groups = scales.shape
    second = None
    if layout.two_planes:
        second = SecondPlane(*(parts[f"{projection}.{param}"].offset for param in SECOND_PLANE))
    return Matrix(
        rows,
        groups * quantization.group_size,
        PLANE_BITS if second else quantization.bits,
        quantization.group_size,
        scales.dtype,
        weight.offset,
        scales.offset,
        biases.offset,
        second,
    )
