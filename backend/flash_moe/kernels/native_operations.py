"""Operations of mlx-lm's models that the native kernels compute on a CPU: attention, and the gated
delta rule. What they do not compute, MLX does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import numpy as np

from flash_moe.kernels.gated_delta import GatedDelta
from flash_moe.kernels.native import HEAD_STEP, LANES, WIDEST_HEAD, Native, load_native
from flash_moe.kernels.spec import F32
from flash_moe.upstream import Operation, Replacement


@cache
def native_operations() -> dict[str, Replacement]:
    """For upstream.operations."""
    native = load_native()
    return {
        "attention": partial(NativeAttention, native),
        "gated_delta": partial(NativeGatedDelta, native=native),
    }


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """In the place of `mx.fast.scaled_dot_product_attention`, which `otherwise` is."""

    native: Native
    otherwise: Operation

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if sinks is not None or isinstance(mask, mx.array) or not _attends(q, k, v):
            own: mx.array = self.otherwise(q, k, v, scale=scale, mask=mask, sinks=sinks)
            return own
        mx.eval(q, k, v)
        queries, keys, values = (_first(array) for array in (q, k, v))
        out = self.native.attention(queries, keys, values, scale, mask is not None)
        return mx.array(out)[None]


def _attends(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether the native kernel computes attention for these."""
    batch, heads, rows, columns = q.shape
    return (
        q.dtype == k.dtype == v.dtype == mx.float32
        and batch == k.shape[0] == 1
        and k.shape == v.shape
        and columns == k.shape[-1] <= WIDEST_HEAD
        and columns % HEAD_STEP == 0
        and heads % k.shape[1] == 0
        and rows <= k.shape[2]
    )


@dataclass(frozen=True, slots=True)
class NativeGatedDelta(GatedDelta):
    native: Native

    def fits(self, *arrays: mx.array) -> bool:
        q, _, _, g, *_ = arrays
        # A gate for every key has an axis more.
        fits = g.ndim == 3 and q.shape[3] % LANES == 0
        return fits and all(array.dtype == mx.float32 for array in arrays)

    def compute(self, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        mx.eval(*arrays)
        y, new = self.native.gated_delta(*(_first(array) for array in arrays))
        return mx.array(y)[None], mx.array(new)[None]


def _first(array: mx.array) -> F32:
    """The one conversation of a batch: the array's own memory."""
    first: F32 = np.array(array, copy=False)[0]
    return first
