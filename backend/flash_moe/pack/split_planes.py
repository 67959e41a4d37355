"""Codes of 4 bits as two planes of 2: `code = 4 * high + low`.

Both planes give the 4-bit weights back, exactly. For the first plane alone, a 2-bit matrix whose
codes are fixed, the scale and bias of a group that minimise the squared error are a linear
regression of the group's weights on its high halves: a formula. Gaussian weights are 0.35 off by
it, and 0.33 with 2-bit codes that are free; that is the price of one pack for both.

numpy is enough for it: 0.2 GB/s of codes a core, weighted or not (Zen 5).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_moe.arrays import float32_view, numpy_view
from flash_moe.errors import CheckpointError, Remedy
from flash_moe.format.layout import AFFINE, SECOND_PLANE, Quantization
from flash_moe.machine import usable_cores
from flash_moe.pack.transform import Arrays, Columns, require_sound

U32 = npt.NDArray[np.uint32]
F64 = npt.NDArray[np.float64]

# Weights at a time, so that intermediate arrays stay in a core's cache.
BLOCK = 1 << 18
# A smaller share of the mean square than this is not variance but rounding.
NO_VARIANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Line:
    """For every group [rows, groups]: `code ≈ slope * (high - high_mean) + code_mean`."""

    slope: F64
    high_mean: F64
    code_mean: F64


def split_planes(arrays: Arrays, source: Quantization, importance: Columns | None = None) -> Arrays:
    """The parts of both planes of a 4-bit matrix as mlx-lm has it. `importance` weighs the squared
    error of each column."""
    weight = numpy_view(arrays["weight"])
    scales, biases = (arrays[name] for name in AFFINE[1:])
    if not mx.isfinite(scales).all() or not mx.isfinite(biases).all():
        raise CheckpointError(
            "Some expert weights are infinite or not a number, so no scale fits them. Pack the "
            "experts without planes.",
            Remedy.PACK_WITHOUT_PLANES,
        )
    high, low = split_codes(weight)
    line = fit_line(weight, source.group_size, importance)
    first = (mx.array(high), *_first_plane_scales(line, scales, biases))
    second = (mx.array(low), scales, biases)
    return dict(zip((*AFFINE, *SECOND_PLANE), (*first, *second), strict=True))


def split_codes(weight: U32) -> tuple[U32, U32]:
    """The high and the low halves of packed codes, packed as MLX packs 2 bits."""
    rows, words = weight.shape
    halves = np.empty((2, rows, 2 * words), np.uint8)

    def split(block: slice) -> None:
        both = _halves().take(np.ascontiguousarray(weight[block]).view(np.uint16))
        halves[0, block], halves[1, block] = both & 0xFF, both >> 8

    _in_blocks(split, weight)
    high, low = halves.view(np.uint32)
    return high, low


def fit_line(weight: U32, group_size: int, importance: Columns | None = None) -> Line:
    """The best line through every group's codes over their high halves. It is flat where all high
    halves are equal; a group without any importance is fitted as if all of it counted alike."""
    weights = _weights(weight.shape[1] * 8, group_size, importance)
    sums = np.empty((4, len(weight), len(weights)))

    def add_up(block: slice) -> None:
        sums[:, block] = _sums(weight[block], weights)

    _in_blocks(add_up, weight)
    high, squares, low, products = sums
    variance = squares - high * high
    varies = variance > NO_VARIANCE * squares
    slope = 4 + np.divide(products - high * low, variance, where=varies, out=np.full_like(low, -4))
    return Line(slope, high, 4 * high + low)


def _weights(columns: int, group_size: int, importance: Columns | None) -> F64:
    """The weight of every column in its group [groups, group_size], one in all."""
    if importance is None:
        return np.full((columns // group_size, group_size), 1 / group_size)
    require_sound(importance, columns)
    weights = importance.astype(np.float64).reshape(-1, group_size)
    weights = np.where(weights.any(-1, keepdims=True), weights, 1.0)
    shares: F64 = weights / weights.sum(-1, keepdims=True)
    return shares


def _sums(weight: U32, weights: F64) -> F64:
    """Σ of w·high, w·high², w·low and w·high·low over every group, [4, rows, groups]: exact where
    weights are a power of two."""
    pairs = np.ascontiguousarray(weight).view(np.uint8).reshape(len(weight), len(weights), -1)
    sums = np.zeros((4, len(weights), len(weight)))
    # The codes at even places and those at odd ones: the halves of bytes.
    for codes, shares in ((pairs & 15, weights[:, 0::2]), (pairs >> 4, weights[:, 1::2])):
        high, low = codes >> 2, codes & 3
        for feature, total in zip((high, high * high, low, high * low), sums, strict=True):
            rows = feature.astype(np.float64).transpose(1, 0, 2)
            total += (rows @ shares[:, :, None])[..., 0]
    return sums.transpose(0, 2, 1)


def _first_plane_scales(
    line: Line, scales: mx.array, biases: mx.array
) -> tuple[mx.array, mx.array]:
    """Scale and bias of the first plane, in the type of the source's. The bias is fitted to the
    scale as it was rounded."""
    source_scale, source_bias = (float32_view(p).astype(np.float64) for p in (scales, biases))
    scale = _rounded(source_scale * line.slope, scales.dtype)
    rounded = float32_view(scale).astype(np.float64)
    bias = source_scale * line.code_mean + source_bias - rounded * line.high_mean
    return scale, _rounded(bias, biases.dtype)


def _rounded(values: F64, dtype: mx.Dtype) -> mx.array:
    """Too large ones to the type's largest, never to infinity."""
    most = float(mx.finfo(dtype).max)
    return mx.array(np.clip(values, -most, most).astype(np.float32)).astype(dtype)


def _in_blocks(work: Callable[[slice], None], weight: U32) -> None:
    """Rows at a time, on all cores: numpy releases the interpreter while it computes."""
    rows = max(1, BLOCK // (8 * weight.shape[1]))
    blocks = [slice(at, at + rows) for at in range(0, len(weight), rows)]
    if len(blocks) == 1:
        work(blocks[0])
        return
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(work, blocks))


@cache
def _halves() -> npt.NDArray[np.uint16]:
    """For four codes in 16 bits: their high halves in the first byte, the low ones in the
    second."""
    words = np.arange(1 << 16)
    halves = np.zeros_like(words)
    for place in range(4):
        code = words >> 4 * place & 15
        halves |= (code >> 2 | (code & 3) << 8) << 2 * place
    return halves.astype(np.uint16)
