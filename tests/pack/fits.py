"""Groups of weights of many kinds, and the errors of their fits in float64."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from benchmarks.minmax import minmax
from flash_moe.arrays import mlx_dtype
from flash_moe.format.layout import AFFINE, Quantization
from flash_moe.pack.affine import pack_codes
from flash_moe.pack.fit import Fitted
from flash_moe.pack.requantize import Quantize, fit_in_mlx, fit_native
from flash_moe.pack.transform import Arrays

F64 = npt.NDArray[np.float64]
FITS: dict[str, Quantize] = {"fit": fit_native, "fit in MLX": fit_in_mlx}
METHODS: dict[str, Quantize] = {**FITS, "minmax": minmax}
# The distributions of weights in a group; a matrix has one row of each.
KINDS = ("normal", "heavy", "uniform", "constant", "pair", "clusters", "three", "outlier", "ends")
# The importance of its columns.
WEIGHINGS = ("none", "even", "uneven", "zeros", "one", "wide", "nothing")


def shape_like(kind: str, columns: int, rng: np.random.Generator) -> F64:
    """Between 0 and 1."""
    if kind in ("normal", "heavy"):
        x = rng.standard_normal(columns) if kind == "normal" else rng.standard_t(3, columns)
        return (x - x.min()) / (x.max() - x.min())
    if kind == "constant":
        return np.full(columns, rng.random())
    few = {"pair": 2, "three": 3}.get(kind)
    if few:
        return rng.choice(rng.random(few), columns)
    x = rng.random(columns)
    if kind == "clusters":
        return np.where(rng.random(columns) < rng.random(), x / 5, 1 - x / 5)
    if kind == "outlier":
        return np.where(np.arange(columns) == rng.integers(columns), 1, x * rng.random() / 3)
    return np.round(x) if kind == "ends" else x


def importance_like(kind: str, columns: int, rng: np.random.Generator) -> Any:
    if kind == "none":
        return None
    weights = {
        "even": np.full(columns, 0.7),
        "uneven": rng.random(columns),
        "zeros": rng.random(columns) * (rng.random(columns) < 0.5),
        "one": np.arange(columns) == rng.integers(columns),
        "wide": 10.0 ** rng.uniform(-9, 9, columns),
        "nothing": np.zeros(columns),
    }
    return weights[kind].astype(np.float32)


@cache
def partitions() -> npt.NDArray[np.int64]:
    """All ways to give 16 ordered codes one of four rising levels: [969, 16]."""
    starts = combinations_with_replacement(range(17), 3)
    return np.array([[sum(c >= s for s in cut) for c in range(16)] for cut in starts])


def least_error(codes: npt.NDArray[np.uint8], weights: F64) -> F64:
    """The least error of each group [n, size]: all partitions, with their best scale and bias."""
    least = []
    for group, w in zip(codes, weights, strict=True):
        counts = np.bincount(group, w, 16) / w.sum()
        x = np.arange(16) - (counts * np.arange(16)).sum()
        q = partitions() @ counts
        spread = ((partitions() - q[:, None]) ** 2) @ counts
        v = (partitions() - q[:, None]) @ (counts * x)
        gain = np.where(spread > 1e-30, v**2 / np.where(spread > 1e-30, spread, 1), 0)
        # Not variance less gain, which would leave nothing but rounding of a small error.
        best = int(np.argmax(gain))
        slope = v[best] / spread[best] if spread[best] > 1e-30 else 0.0
        least.append((counts * (x - slope * (partitions()[best] - q[best])) ** 2).sum() * w.sum())
    return np.array(least)


def unpack(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.int64]:
    rows = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")
    return rows.reshape(len(packed), -1, bits) @ (1 << np.arange(bits))


def wide(scales: npt.NDArray[Any]) -> F64:
    if scales.dtype == np.uint16:
        scales = (scales.astype(np.uint32) << 16).view(np.float32)
    return scales.astype(np.float64)


def levels(fitted: Fitted, bits: int, group: int) -> F64:
    scales, biases = (np.repeat(wide(part), group, axis=1) for part in fitted[1:])
    return unpack(fitted[0], bits) * scales + biases


def dequantized(matrix: tuple[mx.array, ...], bits: int, group: int) -> F64:
    """The weights that MLX's arrays stand for."""
    codes, scales, biases = (
        np.array(part if part.dtype == mx.uint32 else part.astype(mx.float32)) for part in matrix
    )
    return levels((codes, scales, biases), bits, group)


def errors(values: F64, fitted: F64, importance: Any, group: int) -> F64:
    """The weighted squared error of every group."""
    columns = values.shape[1]
    weights = np.ones(columns) if importance is None else importance.astype(np.float64)
    weights = np.where(np.repeat(weights.reshape(-1, group).sum(1), group) > 0, weights, 1)
    return ((values - fitted) ** 2 * weights).reshape(len(values), -1, group).sum(-1)


def four_bits(
    rng: np.random.Generator, kind: str, columns: int, group: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32], Any, Any]:
    """Codes of rows of every kind, packed, and scales and biases of a type."""
    codes = np.array([np.rint(shape_like(k, columns, rng) * 15) for k in KINDS], np.uint8)
    shape = (len(KINDS), columns // group)
    scales = mx.array(rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-3, 0, shape))
    biases = mx.array(rng.normal(size=shape) * 3)
    stored = [mx.array(part).astype(mlx_dtype(kind)) for part in (scales, biases)]
    if kind == "bfloat16":
        stored = [part.view(mx.uint16) for part in stored]
    packed = np.array(pack_codes(mx.array(codes), 4))
    return codes, packed, *(np.array(part) for part in stored)


def matrix(
    rng: np.random.Generator,
    source: int | None,
    group: int,
    dtype: str,
    scale: float,
    center: float,
) -> tuple[Arrays, Quantization | None, mx.array]:
    values = np.array([shape_like(k, 256, rng) for k in KINDS])
    return quantized((center + scale * values).astype(np.float32), source, group, dtype)


def quantized(
    values: npt.NDArray[np.float32], bits: int | None, group: int, dtype: str
) -> tuple[Arrays, Quantization | None, mx.array]:
    """A matrix as mlx-lm has it, its quantization, and its weights in float32."""
    x = mx.array(values).astype(mlx_dtype(dtype))
    if bits is None:
        return {"weight": x}, None, x.astype(mx.float32)
    arrays = dict(zip(AFFINE, mx.quantize(x, group_size=group, bits=bits), strict=True))
    scales, biases = (arrays[name].astype(mx.float32) for name in AFFINE[1:])
    plain = mx.dequantize(arrays["weight"], scales, biases, group_size=group, bits=bits)
    return arrays, Quantization(bits, group, "affine"), plain
