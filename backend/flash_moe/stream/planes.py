"""Experts of 4 bits in two planes: which pairs are computed in full, and plain MLX's way to it.

A code is `4 * high + low`. The first plane is the high halves, with a scale and bias of their own;
it is a matrix of 2 bits like any other. Both together are the words of 4 bits that mlx-lm has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.format.layout import AFFINE, PLANE_BITS, SECOND_PLANE, Layout
from flash_moe.kernels.spec import FULL, SLOT_MASK, U32, inverse
from flash_moe.stream.precision import Flags

Arrays = Mapping[str, mx.array]


def mark_full(slots: U32, full: Flags | bool) -> U32:
    return np.where(full, slots | np.uint32(FULL), slots)


def sort_key(slots: U32) -> U32:
    """Brings the pairs of an expert together, and among them those that are computed in full."""
    return slots << np.uint32(1) | slots >> np.uint32(31)


def experts_in_full(slots: U32, experts: int) -> Flags:
    """Which experts have a pair that is computed in full, so that both planes must be read."""
    flags = np.zeros(experts, np.bool_)
    flags[slots[slots >= FULL] & SLOT_MASK] = True
    return flags


def compute(switch: nn.Module, layout: Layout, arrays: Arrays, x: mx.array, slots: U32) -> mx.array:
    """`switch(x, slots)`, every pair from the planes that it is marked for. Each row is computed on
    its own, so that rows are to the bit what they would be together."""
    full, places = slots >= FULL, slots & SLOT_MASK
    if full.all() or not full.any():
        return _compute_alike(switch, layout, arrays, x, places, bool(full.any()))
    x = mx.broadcast_to(x, (*slots.shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])
    order, rows = [], []
    for kind in (True, False):
        pairs = np.flatnonzero(full == kind)
        tokens, of = pairs // slots.shape[-1], places.reshape(-1, 1)[pairs]
        rows.append(_compute_alike(switch, layout, arrays, x[mx.array(tokens)], of, kind))
        order.append(pairs)
    output = mx.concatenate(rows).squeeze(-2)[mx.array(inverse(np.concatenate(order)))]
    return output.reshape(*slots.shape, output.shape[-1])


def _compute_alike(
    switch: nn.Module, layout: Layout, arrays: Arrays, x: mx.array, places: U32, full: bool
) -> mx.array:
    _bind(switch, layout, arrays, full)
    output: mx.array = switch(x, mx.array(places))
    # Joined words are no views of the bank: drop them now, not when the layer goes.
    if full:
        _bind(switch, layout, arrays, full=False)
    return output


def _bind(switch: nn.Module, layout: Layout, arrays: Arrays, full: bool) -> None:
    """Let mlx-lm's module read a lane as matrices of 2 bits, or of 4."""
    for part in layout.parts:
        if not part.in_second_plane:
            switch[part.projection][part.param] = arrays[part.name]
    for name, _ in layout.quantization:
        switch[name].bits = PLANE_BITS * (2 if full else 1)
        if full:
            second = [arrays[f"{name}.{param}"] for param in SECOND_PLANE]
            second[0] = join(arrays[f"{name}.weight"], second[0])
            for param, array in zip(AFFINE, second, strict=True):
                switch[name][param] = array


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
