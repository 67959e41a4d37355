"""Specs and resident matrices as the C structs that the native kernels take."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flash_moe.kernels.spec import (
    BITS,
    GROUP_SIZES,
    SCALE_TYPES,
    U32,
    ExpertSpec,
    Matrix,
    part_offsets,
)
from flash_moe.native.arguments import require, require_array

RESIDENT_BITS = (2, 3, 4, 5, 6, 8)
SCALE_DTYPES = {"uint16": "bfloat16", "float16": "float16", "float32": "float32"}


class MatrixStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("rows", "columns", "weight", "scales", "biases")),
        *((name, ctypes.c_uint32) for name in ("bits", "group", "type", "planes")),
        ("low", ctypes.c_uint64),
    )


class ExpertStruct(ctypes.Structure):
    _fields_ = tuple((name, MatrixStruct) for name in ("gate", "up", "down"))


class SpecStruct(ctypes.Structure):
    _fields_ = (("first", ExpertStruct), ("full", ExpertStruct), ("parts", ctypes.c_uint64))


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A quantized matrix in memory, ready for `Native.matmul`; keeps its arrays alive."""

    rows: int
    columns: int
    arrays: tuple[npt.NDArray[Any], ...]
    struct: MatrixStruct


def resident(
    weight: U32,
    scales: npt.NDArray[Any],
    biases: npt.NDArray[Any],
    *,
    bits: int,
    group_size: int,
) -> Resident:
    """From the arrays of MLX's QuantizedLinear: weight uint32 [rows, columns * bits / 32]."""
    kind = SCALE_DTYPES.get(scales.dtype.name)
    require(kind is not None, f"scales are {scales.dtype}, not uint16 (bfloat16) or float")
    require(bits in RESIDENT_BITS, f"{bits} bits are not among {RESIDENT_BITS}")
    require(group_size in GROUP_SIZES, f"group size {group_size} is not among {GROUP_SIZES}")
    require(scales.ndim == 2, f"scales have {scales.ndim} dimensions, not 2")
    rows, groups = scales.shape
    columns = groups * group_size
    require(rows > 0 and columns > 0, f"the matrix is empty: {rows} × {columns}")
    weight = require_array("weight", weight, np.uint32, (rows, columns * bits // 32))
    scales = require_array("scales", scales, scales.dtype, (rows, groups))
    biases = require_array("biases", biases, scales.dtype, (rows, groups))
    parts = (weight, scales, biases)
    addresses = [part.ctypes.data for part in parts]
    kinds = SCALE_TYPES.index(kind or "")
    struct = MatrixStruct(rows, columns, *addresses, bits, group_size, kinds, 1)
    return Resident(rows, columns, parts, struct)


@cache
def spec_struct(spec: ExpertSpec) -> tuple[SpecStruct, int]:
    """The spec for C, and the bytes that a record takes."""
    gate, up, down = spec.gate, spec.up, spec.down
    like = (gate.rows, gate.columns)
    require(like == (up.rows, up.columns), "gate and up differ in shape")
    require(like == (down.columns, down.rows), "down does not lead back from gate and up")
    first, full, ends = zip(*(_matrices(m) for m in (gate, up, down)), strict=True)
    require(max(ends) <= spec.stride, f"a record of {max(ends)} bytes in steps of {spec.stride}")
    parts = len(part_offsets(spec))
    return SpecStruct(ExpertStruct(*first), ExpertStruct(*full), parts), max(ends)


def _matrices(m: Matrix) -> tuple[MatrixStruct, MatrixStruct, int]:
    """For a pair of the first, or only, plane; for a pair of both; and where the parts end."""
    require(m.bits in BITS, f"{m.bits} bits are not among {BITS}")
    require(m.group_size in GROUP_SIZES, f"group size {m.group_size} is not among {GROUP_SIZES}")
    require(m.scale_type in SCALE_TYPES, f"scales are {m.scale_type}, not of {SCALE_TYPES}")
    fits = m.rows > 0 and m.columns > 0 and m.columns % m.group_size == 0
    require(fits, f"{m.rows} × {m.columns} in groups of {m.group_size}")
    planes = (m, m.second or m)
    begin = min(min(plane.weight, plane.scales, plane.biases) for plane in planes)
    require(begin >= 0, "a part begins before its record")
    codes = m.rows * m.columns * m.bits // 8
    groups = m.rows * (m.columns // m.group_size) * (4 if m.scale_type == "float32" else 2)
    end = max(max(p.weight + codes, p.scales + groups, p.biases + groups) for p in planes)
    size, kind = (m.rows, m.columns), (m.group_size, SCALE_TYPES.index(m.scale_type))
    first = MatrixStruct(*size, m.weight, m.scales, m.biases, m.bits, *kind, 1)
    second = planes[1]
    parts = (m.weight, second.scales, second.biases)
    full = MatrixStruct(*size, *parts, 2 * m.bits, *kind, 2, second.weight)
    return first, full, end
