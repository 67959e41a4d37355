"""The fit against brute force in float64, and against min/max."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.minmax import minmax
from flash_moe.arrays import mlx_dtype
from flash_moe.format.dtypes import FLOATS
from flash_moe.format.layout import AFFINE, Quantization
from flash_moe.native.build import find_compiler
from flash_moe.pack.cuts import table
from flash_moe.pack.fit import Fit, load_fit
from flash_moe.pack.transform import Arrays
from tests.pack.fits import (
    F64,
    FITS,
    KINDS,
    WEIGHINGS,
    dequantized,
    errors,
    four_bits,
    importance_like,
    least_error,
    levels,
    matrix,
    quantized,
    unpack,
    wide,
)

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def fit() -> Fit:
    return load_fit()


# -- two bits out of four: the optimum ----------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from(WEIGHINGS), st.sampled_from([64, 128]))
@settings(max_examples=40)
def test_two_bits_out_of_four_are_the_optimum(seed: int, weighing: str, group: int) -> None:
    """Scales are float32 here, so that rounding them hides nothing."""
    rng = np.random.default_rng(seed)
    codes, packed, scales, biases = four_bits(rng, "float32", 256, group)
    biases *= 0
    importance = importance_like(weighing, 256, rng)
    fitted = load_fit().codes(
        packed,
        scales,
        biases,
        source_bits=4,
        source_group=group,
        bits=2,
        group_size=group,
        importance=importance,
    )
    values = codes * np.repeat(wide(scales), group, axis=1)
    got = errors(values, levels(fitted, 2, group), importance, group).reshape(-1)
    weights = np.ones(256) if importance is None else importance.astype(np.float64)
    weights = np.where(np.repeat(weights.reshape(-1, group).sum(1), group) > 0, weights, 1)
    rows = np.tile(weights, (len(KINDS), 1)).reshape(-1, group)
    least = least_error(codes.reshape(-1, group), rows) * wide(scales).reshape(-1) ** 2
    # What float32 adds: 1e-7 of a step of the source for each weight, squared.
    slack = rows.sum(1) * (wide(scales).reshape(-1) * 15 * 1e-6) ** 2
    assert np.all(got <= least * (1 + 1e-4) + slack)
    assert np.all(got >= least * (1 - 1e-9) - slack)


def test_the_table_is_smaller_than_all_partitions() -> None:
    """261 of 816 cuts of 16 bins are tried. The test above shows that no other is better."""
    cuts = table(2, 16)
    assert len(np.unique(cuts, axis=0)) == 261
    assert len(cuts) % 2 == 0
    assert np.all(np.diff(cuts.astype(int), axis=1) >= 0)
    assert cuts.max() == 16


@pytest.mark.parametrize(("bits", "bins"), [(3, 16), (3, 64), (4, 64)])
def test_tables_stay_within_their_bins(bits: int, bins: int) -> None:
    cuts = table(bits, bins).astype(int)
    assert cuts.shape[1] == 2**bits - 1
    assert len(cuts) % 2 == 0
    assert np.all(np.diff(cuts, axis=1) >= 0)
    assert cuts.min() >= 0
    assert cuts.max() <= bins


# -- every path ---------------------------------------------------------------------------------


PATHS = [
    (source, bits, source_group, group)
    for source in (None, 3, 4, 8)
    for bits in (2, 3, 4)
    for source_group, group in ((64, 64), (128, 128), (64, 128), (32, 64), (32, 128), (128, 64))
    if bits < (source or 16)
]


def magnitudes(arrays: Arrays, source: Quantization | None, exact: F64, group: int) -> F64:
    """For each weight, the largest number that its group comes from. It says how far float32 rounds
    the weights: 5e-7 - 5e-7 may be 0 there, and 3e-14 in the fit, which computes in float64."""
    largest = np.abs(exact)
    if source is not None:
        scales, biases = (np.abs(wide(np.array(arrays[n].astype(mx.float32)))) for n in AFFINE[1:])
        parts = scales * (2**source.bits - 1) + biases
        largest = np.maximum(largest, np.repeat(parts, source.group_size, axis=1))
    groups = largest.reshape(len(largest), -1, group).max(-1)
    return np.repeat(groups, group, axis=1)


@given(
    seed=st.integers(0, 2**32 - 1),
    path=st.sampled_from(PATHS),
    dtype=st.sampled_from(sorted(FLOATS)),
    scale=st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 3e4]),
    center=st.sampled_from([0.0, -0.01, 1.0, -3e4]),
    weighing=st.sampled_from(WEIGHINGS),
    method=st.sampled_from(sorted(FITS)),
)
@settings(max_examples=100)
@example(0, (4, 2, 64, 64), "float16", 3e4, -3e4, "none", "fit")
@example(0, (4, 2, 64, 64), "float16", 1e-6, 0.0, "none", "fit")
@example(0, (3, 2, 128, 64), "float32", 1e-6, 0.0, "none", "fit")
def test_no_worse_than_minmax_and_codes_are_nearest(
    seed: int,
    path: tuple[int | None, int, int, int],
    dtype: str,
    scale: float,
    center: float,
    weighing: str,
    method: str,
) -> None:
    source, bits, source_group, group = path
    rng = np.random.default_rng(seed)
    arrays, quantization, values = matrix(rng, source, source_group, dtype, scale, center)
    importance = importance_like(weighing, 256, rng)
    fitted = FITS[method](arrays, quantization, bits, group, importance)
    base = minmax(arrays, quantization, bits, group)
    kind = mlx_dtype(dtype)
    assert [part.dtype for part in fitted] == [mx.uint32, kind, kind]
    assert [part.shape for part in fitted] == [part.shape for part in base]
    exact = np.array(values, np.float64)
    assert np.all(np.isfinite(dequantized(fitted, bits, group)))
    got, worst = (
        errors(exact, dequantized(m, bits, group), importance, group) for m in (fitted, base)
    )
    # float32 cannot tell weights apart that differ by less than this.
    largest = magnitudes(arrays, quantization, exact, group)
    noise = 3e-7 * np.sqrt(errors(largest, 0 * exact, importance, group))
    assert np.all(np.sqrt(got) <= np.sqrt(worst) * (1 + 1e-5) + noise)
    codes = unpack(np.array(fitted[0]), bits)
    scales, biases = (
        np.repeat(np.array(part.astype(mx.float32), np.float64), group, axis=1)
        for part in fitted[1:]
    )
    some = scales != 0
    steps = (exact - biases) / np.where(some, scales, 1)
    far = np.abs(codes - np.clip(steps, 0, 2**bits - 1))
    noise = 1e-6 * (np.abs(exact) + np.abs(biases)) / np.where(some, np.abs(scales), 1)
    assert np.all((far <= 0.5 + 1e-4 + noise) | ~some)  # without a scale, any code will do


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_scales_are_rounded_as_mlx_rounds_them(dtype: str, fit: Fit) -> None:
    """Of zeros and one other value, the scale is a third of it."""
    rng = np.random.default_rng(3)
    high = (rng.normal(size=4096) * 10.0 ** rng.uniform(-7, 3, 4096)).astype(np.float32)
    values = np.zeros((4096, 64), np.float32)
    values[:, ::2] = high[:, None]
    scales = wide(fit.values(values, bits=2, group_size=64, scale_type=dtype)[1]).reshape(-1)
    step = (np.abs(high.astype(np.float64)) / 3).astype(np.float32)
    expected = mx.array(step).astype(mlx_dtype(dtype)).astype(mx.float32)
    # The fit rounds once. `step` was rounded to float32 before, which may make a tie.
    assert np.mean(scales == np.array(expected)) > 0.999


# -- the fallback -------------------------------------------------------------------------------


@pytest.mark.parametrize("weighing", ["none", "uneven"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("source", [4, None])
def test_the_fallback_is_nearly_as_good(source: int | None, bits: int, weighing: str) -> None:
    """The root mean square error is within 2 %, at times less: then neither is the optimum."""
    if source == bits:
        return
    rng = np.random.default_rng(5)
    for values in (rng.standard_normal((64, 512)), rng.standard_t(4, (64, 512))):
        arrays, quantization, plain = quantized(values.astype(np.float32), source, 64, "bfloat16")
        exact, importance = np.array(plain, np.float64), importance_like(weighing, 512, rng)
        fits = [fit(arrays, quantization, bits, 64, importance) for fit in FITS.values()]
        native, fallback = (
            np.sqrt(errors(exact, dequantized(matrix, bits, 64), importance, 64).mean())
            for matrix in fits
        )
        assert 0.98 < fallback / native < 1.02
