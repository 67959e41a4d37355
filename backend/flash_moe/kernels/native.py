"""The native kernels, typed: arguments are checked here, so that no call can leave its arrays.

Arrays are numpy's; bfloat16 scales are given as uint16. A call releases the GIL, and calls from
several threads take turns.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flash_moe.kernels.spec import BITS, GROUP_SIZES, SCALE_TYPES, WHOLE, ExpertSpec, Matrix
from flash_moe.native.arguments import require, require_array
from flash_moe.native.build import Library, NativeUnavailable, build, find_compiler

__all__ = [
    "Native",
    "NativeUnavailable",
    "Resident",
    "find_compiler",
    "load_native",
    "resident",
]

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]

KERNELS = Library(
    "native",
    "the native kernels",
    tuple(
        Path(__file__).with_name(f"native{n}") for n in (".c", "_pool.h", "_product.h", "_simd.h")
    ),
)
RESIDENT_BITS = (2, 3, 4, 5, 6, 8)
SCALE_DTYPES = {"uint16": "bfloat16", "float16": "float16", "float32": "float32"}
MOST_THREADS = 256


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("rows", "columns", "weight", "scales", "biases")),
        *((name, ctypes.c_uint32) for name in ("bits", "group", "type", "planes")),
        ("low", ctypes.c_uint64),
    )


class _Expert(ctypes.Structure):
    _fields_ = tuple((name, _Matrix) for name in ("gate", "up", "down"))


class _Spec(ctypes.Structure):
    _fields_ = (("first", _Expert), ("whole", _Expert), ("stride", ctypes.c_uint64))


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A quantized matrix in memory, ready for `Native.matmul`; keeps its arrays alive."""

    rows: int
    columns: int
    arrays: tuple[npt.NDArray[Any], ...]
    struct: _Matrix


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
    struct = _Matrix(rows, columns, *addresses, bits, group_size, kinds, 1)
    return Resident(rows, columns, parts, struct)


class Native:
    """The kernels of one compiled library. Its threads are shared by all who use it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_uint64
        library.flash_experts.argtypes = [pointer] * 7 + [number] * 2
        library.flash_matmul.argtypes = [pointer] * 3 + [number]
        library.flash_router.argtypes = [pointer] * 3 + [number] * 3 + [ctypes.c_int]
        library.flash_router.restype = None
        library.flash_set_threads.argtypes = [ctypes.c_int]
        library.flash_set_threads.restype = None
        library.flash_simd.restype = ctypes.c_char_p
        self._library = library
        self.file = str(library._name)
        self.simd: str = library.flash_simd().decode()

    @property
    def threads(self) -> int:
        return int(self._library.flash_threads())

    @threads.setter
    def threads(self, count: int) -> None:
        require(1 <= count <= MOST_THREADS, f"{count} threads: not between 1 and {MOST_THREADS}")
        self._library.flash_set_threads(count)

    def experts(
        self,
        spec: ExpertSpec,
        bank: int | memoryview,
        x: F32,
        slots: U32,
        weights: F32 | None = None,
        base: F32 | None = None,
        *,
        count: int | None = None,
    ) -> F32:
        """With weights: base[t] + sum over k of weights[t, k] * expert_{slots[t, k]}(x[t]), summed
        in the order of k, float32 [tokens, hidden]. Without: every expert's output,
        [tokens, k, hidden]. What a token gets does not depend on the others, nor on the threads.
        A slot with WHOLE set is computed from both planes of its record.

        `bank` is slot 0: an address, whose `count` of slots is believed, or a buffer of bytes.
        """
        struct, end = _spec(spec)
        address = bank if isinstance(bank, int) else 0
        if not isinstance(bank, int):
            held = np.frombuffer(bank, np.uint8)
            address = held.ctypes.data
            there = max(0, (held.size - end) // spec.stride + 1) if held.size >= end else 0
            count = there if count is None else min(count, there)
        hidden = spec.hidden
        slots = require_array("slots", slots, np.uint32, (-1, -1))
        tokens, k = slots.shape
        x = require_array("x", x, np.float32, (tokens, hidden))
        if slots.size:
            spec.check_choice(int(slots.max()))
            if count is not None and (largest := int((slots & ~np.uint32(WHOLE)).max())) >= count:
                raise ValueError(f"slot {largest}: the bank has {count}")
        shape: tuple[int, ...] = (tokens, k, hidden)
        if weights is not None:
            weights = require_array("weights", weights, np.float32, (tokens, k))
            shape = (tokens, hidden)
        if base is not None:
            require(weights is not None, "base without weights: there is no sum to add it to")
            base = require_array("base", base, np.float32, (tokens, hidden))
        if not slots.size:
            return np.zeros(shape, np.float32) if base is None else base.copy()
        out = np.empty(shape, np.float32)
        failed = self._library.flash_experts(
            ctypes.addressof(struct),
            address,
            x.ctypes.data,
            slots.ctypes.data,
            None if weights is None else weights.ctypes.data,
            None if base is None else base.ctypes.data,
            out.ctypes.data,
            tokens,
            k,
        )
        if failed:
            raise MemoryError(f"no memory for {tokens} tokens of {k} experts")
        return out

    def matmul(self, matrix: Resident, x: F32) -> F32:
        """matrix · x for every row of x [..., columns]: float32 [..., rows]."""
        x = require_array("x", x, np.float32, (*x.shape[:-1], matrix.columns))
        out = np.empty((*x.shape[:-1], matrix.rows), np.float32)
        tokens = x.size // matrix.columns
        if tokens and self._library.flash_matmul(
            ctypes.addressof(matrix.struct), x.ctypes.data, out.ctypes.data, tokens
        ):
            raise MemoryError(f"no memory for {tokens} tokens of {matrix.columns} columns")
        return out

    def router(self, logits: F32, k: int, renormalise: bool) -> tuple[U32, F32]:
        """Softmax over all experts, and the k likeliest by falling logit, ties to the lowest id:
        uint32 ids and float32 weights, [tokens, k]. NaN ranks last and makes the weights NaN."""
        logits = require_array("logits", logits, np.float32, (-1, -1))
        tokens, n = logits.shape
        require(1 <= k <= n, f"{k} of {n} experts")
        ids = np.empty((tokens, k), np.uint32)
        weights = np.empty((tokens, k), np.float32)
        self._library.flash_router(
            logits.ctypes.data, ids.ctypes.data, weights.ctypes.data, tokens, n, k, renormalise
        )
        return ids, weights


@cache
def load_native(extra_flags: tuple[str, ...] = ()) -> Native:
    """Compiled on the first use on a machine, some seconds long. Raises NativeUnavailable."""
    return Native(build(KERNELS, extra_flags))


@cache
def _spec(spec: ExpertSpec) -> tuple[_Spec, int]:
    """The spec for C, and the bytes that a record takes."""
    gate, up, down = spec.gate, spec.up, spec.down
    like = (gate.rows, gate.columns)
    require(like == (up.rows, up.columns), "gate and up differ in shape")
    require(like == (down.columns, down.rows), "down does not lead back from gate and up")
    first, whole, ends = zip(*(_matrices(m) for m in (gate, up, down)), strict=True)
    require(max(ends) <= spec.stride, f"a record of {max(ends)} bytes in steps of {spec.stride}")
    return _Spec(_Expert(*first), _Expert(*whole), spec.stride), max(ends)


def _matrices(m: Matrix) -> tuple[_Matrix, _Matrix, int]:
    """What a pair of the first plane needs, or the only one, what a pair of both, and their end."""
    require(m.bits in BITS, f"{m.bits} bits are not among {BITS}")
    require(m.group_size in GROUP_SIZES, f"group size {m.group_size} is not among {GROUP_SIZES}")
    require(m.scale_type in SCALE_TYPES, f"scales are {m.scale_type}, not of {SCALE_TYPES}")
    fits = m.rows > 0 and m.columns > 0 and m.columns % m.group_size == 0
    require(fits, f"{m.rows} × {m.columns} in groups of {m.group_size}")
    planes = (m, m.rest or m)
    begin = min(min(plane.weight, plane.scales, plane.biases) for plane in planes)
    require(begin >= 0, "a part begins before its record")
    codes = m.rows * m.columns * m.bits // 8
    groups = m.rows * (m.columns // m.group_size) * (4 if m.scale_type == "float32" else 2)
    end = max(max(p.weight + codes, p.scales + groups, p.biases + groups) for p in planes)
    size, kind = (m.rows, m.columns), (m.group_size, SCALE_TYPES.index(m.scale_type))
    first = _Matrix(*size, m.weight, m.scales, m.biases, m.bits, *kind, 1)
    rest = planes[1]
    parts = (m.weight, rest.scales, rest.biases)
    whole = _Matrix(*size, *parts, 2 * m.bits, *kind, 2, rest.weight)
    return first, whole, end
