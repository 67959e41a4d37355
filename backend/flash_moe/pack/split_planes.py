"""Codes of 4 bits as two planes of 2: `code = 4 * high + low`.

Both give the weights of 4 bits back, exactly. For the first alone, weights of 2 bits whose codes
are fixed, the scale and bias of a group that make the squared error least are a linear regression
of the group's weights on its high halves: a formula. Gaussian weights are 0.35 off by it, and 0.33
with codes of 2 bits that are free; that is the price of one pack for both.

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

from flash_moe.errors import CheckpointError
from flash_moe.format.layout import CODES, RESTS, Quantization
from flash_moe.machine import usable_cores
from flash_moe.pack.planes import Planes
from flash_moe.pack.recast import Arrays, Columns
from flash_moe.pack.requantize import require_sound

U32 = npt.NDArray[np.uint32]
F64 = npt.NDArray[np.float64]

# Weights at a time, so that what is between lies in a core's cache.
BLOCK = 1 << 18
# Of a variance, what rounding may leave where there is none.
NOTHING = 1e-12


@dataclass(frozen=True, slots=True)
class Line:
    """Of every group [rows, groups]: `code ≈ slope * (high - high_mean) + code_mean`."""

    slope: F64
    high_mean: F64
    code_mean: F64


def make_planes(calibration: str | None = None) -> Planes:
    """What `pack` is to do with the experts."""
    return Planes(two_planes, calibration)


def two_planes(
    arrays: Arrays, source: Quantization, importance: Columns | None = None
) -> dict[str, mx.array]:
    """A matrix of 4 bits as mlx-lm has it → the parts of both planes. `importance` weighs the
    squared error of each column."""
    weight = np.array(arrays["weight"], copy=False)
    scales, biases = (arrays[name] for name in CODES[1:])
    if not mx.isfinite(scales).all() or not mx.isfinite(biases).all():
        raise CheckpointError(
            "Some expert weights are infinite or not a number, which no scale fits. Pack the "
            "experts as they are: leave out --planes"
        )
    high, low = split(weight)
    line = fit_line(weight, source.group_size, importance)
    first = _first(line, scales, biases)
    made = (mx.array(high), *first, mx.array(low), scales, biases)
    return dict(zip((*CODES, *RESTS), made, strict=True))


def split(weight: U32) -> tuple[U32, U32]:
    """The high and the low halves of packed codes, packed as MLX packs 2 bits."""
    rows, words = weight.shape
    halves = np.empty((2, rows, 2 * words), np.uint8)

    def part(block: slice) -> None:
        both = _halves().take(np.ascontiguousarray(weight[block]).view(np.uint16))
        halves[0, block], halves[1, block] = both & 0xFF, both >> 8

    _in_blocks(part, weight)
    high, low = halves.view(np.uint32)
    return high, low


def fit_line(weight: U32, group_size: int, importance: Columns | None = None) -> Line:
    """The best line through every group's codes over their high halves. Where those are all one,
    it is flat; a group without any importance is fitted as if all of it mattered alike."""
    columns = weight.shape[1] * 8
    if importance is not None:
        require_sound(importance, columns)
    given = np.ones(columns) if importance is None else importance.astype(np.float64)
    weights = given.reshape(-1, group_size)
    weights = np.where(weights.any(-1, keepdims=True), weights, 1.0)
    weights = weights / weights.sum(-1, keepdims=True)
    sums = np.empty((4, len(weight), len(weights)))

    def part(block: slice) -> None:
        sums[:, block] = _sums(weight[block], weights)

    _in_blocks(part, weight)
    high, squares, low, products = sums
    variance = squares - high * high
    varies = variance > NOTHING * squares
    slope = 4 + np.divide(products - high * low, variance, where=varies, out=np.full_like(low, -4))
    return Line(slope, high, 4 * high + low)


def _sums(weight: U32, weights: F64) -> F64:
    """Σ of w·high, w·high², w·low and w·high·low over every group, [4, rows, groups]: exact where
    weights are a power of two."""
    pairs = np.ascontiguousarray(weight).view(np.uint8).reshape(len(weight), len(weights), -1)
    sums = np.zeros((4, len(weights), len(weight)))
    # The codes at even places and those at odd ones: the halves of bytes.
    for codes, of in ((pairs & 15, weights[:, 0::2]), (pairs >> 4, weights[:, 1::2])):
        high, low = codes >> 2, codes & 3
        for feature, found in zip((high, high * high, low, high * low), sums, strict=True):
            found += (feature.astype(np.float64).transpose(1, 0, 2) @ of[:, :, None])[..., 0]
    return sums.transpose(0, 2, 1)


def _first(line: Line, scales: mx.array, biases: mx.array) -> tuple[mx.array, mx.array]:
    """Scale and bias of the first plane, in the type of the source's; the bias fits the scale as it
    was rounded."""
    of_codes, offset = (np.array(p.astype(mx.float32), np.float64) for p in (scales, biases))
    scale = _rounded(of_codes * line.slope, scales.dtype)
    kept = np.array(scale.astype(mx.float32), np.float64)
    bias = of_codes * line.code_mean + offset - kept * line.high_mean
    return scale, _rounded(bias, biases.dtype)


def _rounded(values: F64, dtype: mx.Dtype) -> mx.array:
    """Too large ones to the type's largest, never to infinity."""
    most = float(mx.finfo(dtype).max)
    return mx.array(np.clip(values, -most, most).astype(np.float32)).astype(dtype)


def _in_blocks(part: Callable[[slice], None], weight: U32) -> None:
    """Rows at a time, on all cores: numpy lets go of the interpreter while it computes."""
    rows = max(1, BLOCK // (8 * weight.shape[1]))
    blocks = [slice(at, at + rows) for at in range(0, len(weight), rows)]
    if len(blocks) == 1:
        part(blocks[0])
        return
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(part, blocks))


@cache
def _halves() -> npt.NDArray[np.uint16]:
    """Of four codes in 16 bits: their high halves in the first byte, the low ones in the second."""
    words = np.arange(1 << 16)
    found = np.zeros_like(words)
    for place in range(4):
        code = words >> 4 * place & 15
        found |= (code >> 2 | (code & 3) << 8) << 2 * place
    return found.astype(np.uint16)
