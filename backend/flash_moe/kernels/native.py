"""The native kernels, typed: arguments are checked here, so that no call can leave its arrays.

Arrays are numpy's; bfloat16 scales are given as uint16. A call releases the GIL, and calls from
several threads take turns.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from flash_moe.kernels.spec import F32, SLOT_MASK, U32, U64, ExpertSpec, part_addresses
from flash_moe.kernels.structs import Resident, spec_struct
from flash_moe.native.arguments import require, require_array
from flash_moe.native.build import build
from flash_moe.native.libraries import KERNELS

MOST_THREADS = 256
# The columns of a head: a multiple of two vectors of any processor, and as many as there is room.
HEAD_STEP, WIDEST_HEAD = 32, 256
# The widest vector of floats of any processor.
LANES = 16


class Native:
    """The kernels of one compiled library. Its threads are shared by all who use it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_uint64
        library.flash_experts.argtypes = [pointer] * 6 + [number] * 2
        library.flash_matmul.argtypes = [pointer] * 3 + [number]
        library.flash_attention.argtypes = [
            *[pointer] * 4,
            *[number] * 7,
            ctypes.c_float,
            ctypes.c_int,
        ]
        library.flash_gated_delta.argtypes = [pointer] * 7 + [number] * 5
        library.flash_gated_delta.restype = None
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
        records: U64 | memoryview,
        x: F32,
        slots: U32,
        weights: F32 | None = None,
    ) -> F32:
        """With weights: the sum over k of weights[t, k] * expert_{slots[t, k]}(x[t]), in the order
        of k, float32 [tokens, hidden]. Without: every expert's output, [tokens, k, hidden]. A
        token's result depends neither on the other tokens nor on the threads.

        `records`: a buffer of them, slot after slot, or the addresses of the parts of each slot,
        [slots, parts], which are believed.
        """
        struct, end = spec_struct(spec)
        if isinstance(records, memoryview):
            buffer = np.frombuffer(records, np.uint8)
            fitting = max(0, (buffer.size - end) // spec.stride + 1) if buffer.size >= end else 0
            records = part_addresses(spec, buffer.ctypes.data, fitting)
        parts = require_array("records", records, np.uint64, (len(records), int(struct.parts)))
        hidden = spec.hidden
        slots = require_array("slots", slots, np.uint32, _two_axes(slots))
        tokens, k = slots.shape
        x = require_array("x", x, np.float32, (tokens, hidden))
        if slots.size:
            spec.check_slots(int(np.max(slots)))
            if (largest := int(np.max(slots & SLOT_MASK))) >= len(parts):
                raise ValueError(f"slot {largest}: there are {len(parts)}")
        shape: tuple[int, ...] = (tokens, k, hidden)
        if weights is not None:
            weights = require_array("weights", weights, np.float32, (tokens, k))
            shape = (tokens, hidden)
        if not slots.size:
            return np.zeros(shape, np.float32)
        out = np.empty(shape, np.float32)
        failed = self._library.flash_experts(
            ctypes.addressof(struct),
            parts.ctypes.data,
            x.ctypes.data,
            slots.ctypes.data,
            None if weights is None else weights.ctypes.data,
            out.ctypes.data,
            tokens,
            k,
        )
        if failed:
            raise MemoryError(f"no memory for {tokens} tokens of {k} experts")
        return out

    def matmul(self, matrix: Resident, x: F32) -> F32:
        """matrix · x for every row of x [..., columns]: float32 [..., rows]."""
        shape = (*x.shape[:-1], matrix.columns)
        x = require_array("x", x, np.float32, shape)
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
        logits = require_array("logits", logits, np.float32, _two_axes(logits))
        tokens, n = logits.shape
        if not 1 <= k <= n:
            raise ValueError(f"{k} of {n} experts")
        ids = np.empty((tokens, k), np.uint32)
        weights = np.empty((tokens, k), np.float32)
        self._library.flash_router(
            logits.ctypes.data, ids.ctypes.data, weights.ctypes.data, tokens, n, k, renormalise
        )
        return ids, weights

    def attention(self, q: F32, k: F32, v: F32, scale: float, causal: bool) -> F32:
        """softmax(scale · q kᵀ) v for q [heads, rows, columns] and k, v [kv heads, keys, columns];
        causal: the last row sees all keys, the one before all but the last. The heads of k and v
        may lie apart."""
        heads, rows, columns = q.shape
        kv_heads, keys, _ = k.shape
        fits = columns % HEAD_STEP == 0 and 0 < columns <= WIDEST_HEAD and heads % kv_heads == 0
        require(fits, f"heads of {columns} columns, {heads} for {kv_heads}")
        require(0 < rows <= keys or not causal, f"{rows} rows that see up to {keys} keys")
        require(keys > 0, "no keys")
        q = require_array("q", q, np.float32, (heads, rows, columns))
        k, v = (
            _rows_together(name, array, (kv_heads, keys, columns))
            for name, array in (("k", k), ("v", v))
        )
        out = np.empty_like(q)
        failed = self._library.flash_attention(
            *(array.ctypes.data for array in (q, k, v, out)),
            *(heads, kv_heads, rows, keys, columns),
            *(array.strides[0] // 4 for array in (k, v)),
            scale,
            causal,
        )
        if failed:
            raise MemoryError(f"no memory for {rows} rows of {heads} heads")
        return out

    def gated_delta(self, q: F32, k: F32, v: F32, g: F32, beta: F32, state: F32) -> tuple[F32, F32]:
        """The gated delta rule for q, k [tokens, key heads, keys], v [tokens, heads, values] and
        g, beta [tokens, heads], from a state [heads, values, keys]: y, like v, and the new state.
        The result is the same for tokens in one call and in several."""
        tokens, key_heads, keys = q.shape
        heads, values = v.shape[1:]
        fits = keys > 0 and keys % LANES == 0 and key_heads > 0 and heads % key_heads == 0
        require(fits, f"heads of {keys} keys, {heads} for {key_heads}")
        shapes = {
            "q": (q, q.shape),
            "k": (k, q.shape),
            "v": (v, (tokens, heads, values)),
            "g": (g, (tokens, heads)),
            "beta": (beta, (tokens, heads)),
            "state": (state, (heads, values, keys)),
        }
        *inputs, old = (require_array(n, a, np.float32, s) for n, (a, s) in shapes.items())
        new, y = old.copy(), np.empty_like(inputs[2])
        self._library.flash_gated_delta(
            *(array.ctypes.data for array in (*inputs, new, y)),
            *(tokens, key_heads, heads, keys, values),
        )
        return y, new


def _rows_together(name: str, array: F32, shape: tuple[int, ...]) -> F32:
    """`array` of a shape, a copy unless the rows of each head lie one after the other."""
    require(array.dtype == np.float32, f"{name} is {array.dtype}, not float32")
    require(array.shape == shape, f"{name} has shape {list(array.shape)}, not {list(shape)}")
    together = array.strides[1:] == (4 * shape[2], 4) and array.strides[0] >= 0
    return array if together else np.ascontiguousarray(array)


@cache
def load_native(extra_flags: tuple[str, ...] = ()) -> Native:
    """Where the package has none, compiled on the first use on a machine, some seconds long. Raises
    NativeUnavailable."""
    return Native(build(KERNELS, extra_flags))


def _two_axes(a: Any) -> tuple[int, ...]:
    """Of any length."""
    return a.shape if np.ndim(a) == 2 else (-1, -1)
