"""Requantized weights against float64, and the arithmetic that all ways to requantize share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.minmax import minmax
from flash_moe.arrays import mlx_dtype
from flash_moe.format.dtypes import FLOATS
from flash_moe.pack.affine import pack_codes
from tests.kernels.reference import UNIT


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3]),
    group_size=st.sampled_from([64, 128]),
    dtype=st.sampled_from(FLOATS),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    center=st.sampled_from([0.0, 1.0, -3.0]),
)
@settings(max_examples=60)
def test_extremes_and_nearest_codes_against_float64(
    seed: int, bits: int, group_size: int, dtype: str, spread: float, center: float
) -> None:
    random = np.random.default_rng(seed)
    kind = mlx_dtype(dtype)
    weights = mx.array((center + spread * random.standard_normal((3, 256))).astype(np.float32))
    weights = weights.astype(kind)
    values = np.array(weights.astype(mx.float32))
    packed, scales, biases = minmax({"weight": weights}, None, bits, group_size)
    assert (scales.dtype, biases.dtype) == (kind, kind)
    groups = values.astype(np.float64).reshape(3, -1, group_size)
    largest = 2**bits - 1
    low = groups.min(-1)
    step = (groups.max(-1) - low) / largest
    scale, bias = (np.array(p.astype(mx.float32), np.float64) for p in (scales, biases))
    # Rounded, not cut off: half of a unit of the last place, and what float32 adds to it.
    for got, expected in ((scale, step), (bias, low)):
        rounding = 2 * UNIT[dtype] * np.abs(expected)
        assert np.all(np.abs(got - expected) <= 0.51 * rounding + 1e-6 * spread)
    # Every code is the nearest one under the scale and bias that are stored.
    plain = [mx.ones(scales.shape), mx.zeros(scales.shape)]
    codes = np.array(mx.dequantize(packed, *plain, group_size=group_size, bits=bits))
    codes = codes.reshape(groups.shape)
    exact = (groups - bias[..., None]) / np.where(scale == 0, 1, scale)[..., None]
    assert np.all(np.abs(codes - np.clip(exact, 0, largest)) <= 0.5 + 1e-3)
    assert np.all(codes == np.round(codes))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_are_packed_as_mlx_reads_them(bits: int) -> None:
    codes = mx.random.randint(0, 1 << bits, (5, 128), key=mx.random.key(bits))
    if bits == 1:  # MLX has no such width
        expected = np.packbits(np.array(codes, np.uint8), axis=-1, bitorder="little")
        assert np.array_equal(np.array(pack_codes(codes, 1).view(mx.uint8)), expected)
        return
    packed = pack_codes(codes, bits)
    scales, biases = mx.ones((5, 2)), mx.zeros((5, 2))
    unpacked = mx.dequantize(packed, scales, biases, group_size=64, bits=bits)
    assert np.array_equal(np.array(unpacked), np.array(codes))
