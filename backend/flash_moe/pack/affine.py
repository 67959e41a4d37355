"""Affine codes in MLX's operations: the extremes as levels, nearest codes, packing."""

from __future__ import annotations

import mlx.core as mx

# Eight codes fill whole bytes at any width, and one word of 32 bits up to a width of 4.
TOGETHER = 8


def extremes(groups: mx.array, largest: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The scale and bias that make the smallest and the largest weight of each group the outermost
    levels. At 2 bits that is poor: nearly all weights lie between the two middle levels."""
    low = groups.min(axis=-1, keepdims=True)
    scales = (groups.max(axis=-1, keepdims=True) - low) / largest
    return scales.astype(dtype), low.astype(dtype)


def nearest_codes(groups: mx.array, scales: mx.array, biases: mx.array, largest: int) -> mx.array:
    """The code nearest to each weight, in float32."""
    wide = scales.astype(mx.float32)
    # A group of equal weights has no scale, and any code gives its bias.
    steps = (groups - biases.astype(mx.float32)) / mx.where(wide == 0, 1, wide)
    return mx.clip(mx.round(steps), 0, largest)


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes [rows, columns] → words of 32 bits, the first code in the lowest bits."""
    rows, columns = codes.shape
    shifts = mx.arange(TOGETHER, dtype=mx.uint32) * bits
    words = (codes.astype(mx.uint32).reshape(-1, TOGETHER) << shifts).sum(axis=-1)
    # The bits of eight codes are the first `bits` bytes of their word.
    used = words.astype(mx.uint32).view(mx.uint8).reshape(-1, 4)[:, :bits]
    return mx.contiguous(used).reshape(rows, columns * bits // 8).view(mx.uint32)
