"""The gated delta rule on a GPU, and the short convolution before it, by shaders of ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache, partial

import mlx.core as mx

from flash_moe.kernels.gated_delta import GatedDelta
from flash_moe.kernels.gpu import LANES
from flash_moe.kernels.shaders import GpuKind, kernel
from flash_moe.upstream import Replacement

# Rows of a state that a simdgroup keeps in registers, and simdgroups of a threadgroup.
ROWS, SIMDGROUPS = 4, 4
CONV_THREADS = 256


@cache
def gpu_operations(kind: GpuKind) -> dict[str, Replacement]:
    """For upstream.operations. On Metal mlx-lm has a kernel of its own."""
    return {"gated_delta": partial(GpuGatedDelta, kind=kind)} if kind == "cuda" else {}


@dataclass(frozen=True, slots=True)
class GpuGatedDelta(GatedDelta):
    kind: GpuKind

    def fits(self, *arrays: mx.array) -> bool:
        q, *_, state = arrays
        return q.shape[3] % LANES == 0 and state.dtype == mx.float32

    def compute(self, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        return gated_delta(self.kind, *arrays)


@dataclass(frozen=True, slots=True)
class Gates:
    """What turns a layer's raw projections into the decay and the beta of the rule, [heads]."""

    log_rate: mx.array
    step: mx.array


def gated_delta(
    kind: GpuKind,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """The rows [1, tokens, heads, values] in q's type, and the new state; arrays as mlx-lm has
    them, of one conversation."""
    _, tokens, key_heads, keys = q.shape
    heads, values = v.shape[2:]
    pitch = (key_heads * keys, heads * values)
    return _delta(kind, (q, k, v), decay, beta, None, state, key_heads, pitch, (0, 0), tokens)


def gated_delta_raw(
    kind: GpuKind,
    mixed: mx.array,
    decay: mx.array,
    beta: mx.array,
    gates: Gates,
    state: mx.array,
    key_heads: int,
) -> tuple[mx.array, mx.array]:
    """The same from a row a token of all queries, keys and values, [1, tokens, channels], and from
    what the projections say of decay and beta."""
    _, tokens, channels = mixed.shape
    wide = key_heads * state.shape[-1]
    pitch, first = (channels, channels), (wide, 2 * wide)
    rows = (mixed, mixed, mixed)
    return _delta(kind, rows, decay, beta, gates, state, key_heads, pitch, first, tokens)


def _delta(
    kind: GpuKind,
    rows: tuple[mx.array, mx.array, mx.array],
    decay: mx.array,
    beta: mx.array,
    gates: Gates | None,
    state: mx.array,
    key_heads: int,
    pitch: tuple[int, int],
    first: tuple[int, int],
    tokens: int,
) -> tuple[mx.array, mx.array]:
    _, heads, values, keys = state.shape
    dtype = rows[0].dtype
    names = ("q", "k", "v", "decay", "beta", "log_rate", "step", "state", "count")
    y, kept = kernel(kind, "gated_delta", names, ("y", "kept"))(
        inputs=[
            *(*rows, decay, beta),
            *((gates.log_rate, gates.step) if gates else (beta, beta)),
            *(state, _count(tokens)),
        ],
        template=[
            *(("T", dtype), ("KEY_HEADS", key_heads), ("HEADS", heads), ("DK", keys)),
            *(("DV", values), ("KEY_PITCH", pitch[0]), ("VALUE_PITCH", pitch[1])),
            *(("K0", first[0]), ("V0", first[1]), ("ROWS", ROWS)),
            *(("EACH_KEY", decay.ndim == 4), ("RAW", gates is not None)),
        ],
        grid=(LANES * SIMDGROUPS, -(-values // (ROWS * SIMDGROUPS)), heads),
        threadgroup=(LANES * SIMDGROUPS, 1, 1),
        output_shapes=[(1, tokens, heads, values), state.shape],
        output_dtypes=[dtype, mx.float32],
    )
    return y, kept


@lru_cache(maxsize=64)
def _count(tokens: int) -> mx.array:
    return mx.array([tokens], mx.uint32)


def short_conv(
    kind: GpuKind, x: mx.array, past: mx.array, weight: mx.array
) -> tuple[mx.array, mx.array]:
    """silu of the convolution of x [1, tokens, channels] after `past` [1, taps - 1, channels], and
    the past of the next token; weight [channels, taps, 1]."""
    _, tokens, channels = x.shape
    taps = weight.shape[1]
    y, last = kernel(kind, "short_conv", ("x", "past", "weight", "count"), ("y", "last"))(
        inputs=[x, past, weight, _count(tokens)],
        template=[("T", x.dtype), ("CHANNELS", channels), ("TAPS", taps)],
        grid=(-(-channels // CONV_THREADS) * CONV_THREADS, tokens + taps - 1, 1),
        threadgroup=(CONV_THREADS, 1, 1),
        output_shapes=[x.shape, past.shape],
        output_dtypes=[x.dtype, x.dtype],
    )
    return y, last
