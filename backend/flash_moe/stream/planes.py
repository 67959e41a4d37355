"""Experts of 4 bits in two planes: which pairs are computed from both, and plain MLX's way to it.

A code is `4 * high + low`. The first plane is the high halves, with a scale and bias of their own;
it is a matrix of 2 bits like any other. Both together are the words of 4 bits that mlx-lm has.

A pair is one token and one of the experts that it chose. A pair's slot is its expert's, with WHOLE
set where it is to be computed from both planes; so one read can serve pairs of either kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flash_moe.format.layout import CODES, PLANE_BITS, RESTS, Layout
from flash_moe.kernels.backends import inverse
from flash_moe.kernels.gpu import U32
from flash_moe.kernels.spec import WHOLE

Arrays = Mapping[str, mx.array]
Flags = npt.NDArray[np.bool_]

PLACE = np.uint32(WHOLE - 1)


def marked(slots: U32, whole: Flags | bool) -> U32:
    return np.where(whole, slots | np.uint32(WHOLE), slots)


def by_expert(slots: U32) -> U32:
    """Keys that bring the pairs of an expert together, and of those, the ones of a kind."""
    return slots << np.uint32(1) | slots >> np.uint32(31)


def wanted_whole(slots: U32, experts: int) -> list[bool]:
    """Which experts have a pair that needs both planes."""
    found = np.zeros(experts, np.bool_)
    found[slots[slots >= WHOLE] & PLACE] = True
    return found.tolist()


def compute(inner: nn.Module, layout: Layout, arrays: Arrays, x: mx.array, slots: U32) -> mx.array:
    """`inner(x, slots)`, every pair from the planes that it wants. Rows are computed each on its
    own, so that apart they are to the bit what they are together."""
    whole, places = slots >= WHOLE, slots & PLACE
    if whole.all() or not whole.any():
        return _of_one_kind(inner, layout, arrays, x, places, bool(whole.any()))
    x = mx.broadcast_to(x, (*slots.shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])
    order, rows = [], []
    for kind in (True, False):
        pairs = np.flatnonzero(whole == kind)
        tokens, of = pairs // slots.shape[-1], places.reshape(-1, 1)[pairs]
        rows.append(_of_one_kind(inner, layout, arrays, x[mx.array(tokens)], of, kind))
        order.append(pairs)
    output = mx.concatenate(rows).squeeze(-2)[mx.array(inverse(np.concatenate(order)))]
    return output.reshape(*slots.shape, output.shape[-1])


def _of_one_kind(
    inner: nn.Module, layout: Layout, arrays: Arrays, x: mx.array, places: U32, whole: bool
) -> mx.array:
    _bind(inner, layout, arrays, whole)
    output: mx.array = inner(x, mx.array(places))
    # Not to keep joined words for as long as the layer lives: they are no views of the bank.
    if whole:
        _bind(inner, layout, arrays, whole=False)
    return output


def _bind(inner: nn.Module, layout: Layout, arrays: Arrays, whole: bool) -> None:
    """Let mlx-lm's module read a lane as matrices of 2 bits, or of 4."""
    for part in layout.parts:
        if part.param not in RESTS:
            inner[part.projection][part.param] = arrays[part.name]
    for name, _ in layout.quantization:
        inner[name].bits = PLANE_BITS * (2 if whole else 1)
        if whole:
            rest = [arrays[f"{name}.{param}"] for param in RESTS]
            rest[0] = join(arrays[f"{name}.weight"], rest[0])
            for param, array in zip(CODES, rest, strict=True):
                inner[name][param] = array


def join(high: mx.array, low: mx.array) -> mx.array:
    """Codes of 2 bits, 16 in a word → of 4 bits, 8 in a word."""
    return _interleave(high.view(mx.uint16), low.view(mx.uint16))


# Compiled it is one pass: 3 ms for the 8 MB of words that take MLX 12 ms to multiply with on a CPU,
# and 10 ms in single steps.
@partial(mx.compile, shapeless=True)
def _interleave(high: mx.array, low: mx.array) -> mx.array:
    return _spread(high) << 2 | _spread(low)


def _spread(codes: mx.array) -> mx.array:
    """Eight codes, each to the lower half of four bits."""
    wide = codes.astype(mx.uint32)
    for shift, kept in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)):
        wide = (wide | wide << shift) & kept
    return wide
