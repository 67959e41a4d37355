"""Both planes together are exactly the source's codes; the first alone is the best that its codes
allow."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.arrays import mlx_dtype
from flash_moe.errors import CheckpointError, Remedy
from flash_moe.format.layout import AFFINE, SECOND_PLANE, Quantization
from flash_moe.pack.split_planes import BLOCK, fit_line, split_codes, split_planes
from tests.kernels.reference import UNIT, unpack
from tests.kernels.reference import pack as pack_codes


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    return pack_codes(codes, bits).view(np.uint32)


def matrix(codes: np.ndarray, group: int, dtype: str, seed: int) -> dict[str, mx.array]:
    """A matrix of 4 bits, with random scales."""
    random = np.random.default_rng(seed)
    shape = (len(codes), codes.shape[1] // group)
    scales, biases = (mx.array(random.standard_normal(shape).astype(np.float32)) for _ in range(2))
    kind = mlx_dtype(dtype)
    return {
        "weight": mx.array(words(codes, 4)),
        "scales": scales.astype(kind),
        "biases": biases.astype(kind),
    }


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Codes [rows, columns] of any spread, constant groups among them, and the group size."""
    group = draw(st.sampled_from([32, 64, 128]))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low = random.integers(0, 16, (rows, groups, 1))
    spread = random.integers(1, 17, (rows, groups, 1))
    codes = np.minimum(low + random.integers(0, spread, (rows, groups, group)), 15)
    return codes.reshape(rows, -1).astype(np.uint8), group


importances = st.sampled_from(["none", "alike", "wild", "sparse", "zero"])


def importance_of(kind: str, columns: int, seed: int) -> np.ndarray | None:
    random = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "none": None,
        "alike": np.full(columns, 3.0),
        "wild": 10.0 ** random.uniform(-4, 4, columns),
        "sparse": random.random(columns) * (random.random(columns) < 0.1),
        "zero": np.zeros(columns),
    }
    return None if values[kind] is None else values[kind].astype(np.float32)


@given(code_matrices())
@settings(max_examples=60)
def test_planes_are_the_codes(matrices: tuple[np.ndarray, int]) -> None:
    codes, _ = matrices
    high, low = split_codes(words(codes, 4))
    assert np.array_equal(unpack(high.view(np.uint8), 2), codes >> 2)
    assert np.array_equal(unpack(low.view(np.uint8), 2), codes & 3)


def test_no_block_of_rows_is_left_out() -> None:
    """A matrix of several blocks, the last of which is not full."""
    columns = 256
    rows = 2 * BLOCK // columns + 3
    codes = np.random.default_rng(0).integers(0, 16, (rows, columns), np.uint8)
    high, low = split_codes(words(codes, 4))
    assert np.array_equal(4 * unpack(high.view(np.uint8), 2) + unpack(low.view(np.uint8), 2), codes)
    line = fit_line(words(codes, 4), 64)
    for at in (0, BLOCK // columns, rows - 1):
        alone = fit_line(words(codes[at : at + 1], 4), 64)
        assert np.array_equal(line.slope[at], alone.slope[0])


@given(code_matrices(), importances, st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_the_line_is_that_of_least_squares(
    matrices: tuple[np.ndarray, int], kind: str, seed: int
) -> None:
    codes, group = matrices
    importance = importance_of(kind, codes.shape[1], seed)
    line = fit_line(words(codes, 4), group, importance)
    weights = np.ones(codes.shape[1]) if importance is None else importance.astype(float)
    for row, column in np.ndindex(line.slope.shape):
        place = slice(column * group, (column + 1) * group)
        q, v = codes[row, place].astype(float), weights[place]
        v = v if v.any() else np.ones_like(v)
        slope, high = line.slope[row, column], line.high_mean[row, column]
        intercept = line.code_mean[row, column] - slope * high
        root = np.sqrt(v / v.sum())
        design = np.stack([q // 4, np.ones_like(q)], -1) * root[:, None]
        best, *_ = np.linalg.lstsq(design, q * root, rcond=None)

        def error(a: float, b: float, q: np.ndarray = q, root: np.ndarray = root) -> float:
            return float((((a * (q // 4) + b - q) * root) ** 2).sum())

        least = error(slope, intercept)
        assert least <= error(*best) + 1e-9
        for a, b in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, -1e-3), (-1e-3, 1e-3)):
            assert least <= error(slope + a, intercept + b) + 1e-12
        if len(np.unique((q // 4)[v > 0])) == 1:
            assert slope == 0
            assert np.isclose(intercept, (q * v).sum() / v.sum(), atol=1e-9)


@given(code_matrices(), st.sampled_from(sorted(UNIT)), importances, st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_both_planes_are_the_source_and_the_first_is_the_line(
    matrices: tuple[np.ndarray, int], dtype: str, kind: str, seed: int
) -> None:
    codes, group = matrices
    arrays = matrix(codes, group, dtype, seed)
    importance = importance_of(kind, codes.shape[1], seed)
    parts = split_planes(arrays, Quantization(4, group, "affine"), importance)
    assert list(parts) == [*AFFINE, *SECOND_PLANE]
    for name in AFFINE[1:]:
        assert mx.array_equal(parts[f"rest_{name}"], arrays[name])
        assert parts[name].dtype == arrays[name].dtype
    high, low = (unpack(np.array(parts[p]).view(np.uint8), 2) for p in ("weight", "rest"))
    assert np.array_equal(4 * high + low, codes)
    line = fit_line(words(codes, 4), group, importance)
    scale, bias = wide(arrays["scales"]), wide(arrays["biases"])
    exact = scale * line.slope
    got, offset = wide(parts["scales"]), wide(parts["biases"])
    unit = 1.01 * UNIT[dtype]
    assert np.all(np.abs(got - exact) <= unit * np.abs(exact) + 1e-7)
    # The bias is that of the scale as it was rounded.
    centered = scale * line.code_mean + bias - got * line.high_mean
    assert np.all(np.abs(offset - centered) <= unit * np.abs(centered) + 1e-6)


def test_light_columns_count_where_nothing_else_does() -> None:
    """One code of another high half, however light: the line goes through both."""
    codes, importance = np.full((1, 64), 5, np.uint8), np.ones(64, np.float32)
    codes[0, 7], importance[7] = 14, 1e-5
    line = fit_line(words(codes, 4), 64, importance)
    assert line.slope == pytest.approx(9 / 2)


def test_gaussian_weights() -> None:
    mx.random.seed(5)
    weights = mx.random.normal((256, 1024))
    four = dict(zip(AFFINE, mx.quantize(weights, 64, 4), strict=True))
    parts = split_planes(four, Quantization(4, 64, "affine"))

    def off(*parts: mx.array, bits: int) -> float:
        wide = mx.dequantize(*parts, group_size=64, bits=bits)
        return float(mx.sqrt(((wide - weights) ** 2).sum() / (weights**2).sum()))

    first = off(*(parts[name] for name in AFFINE), bits=2)
    assert first == pytest.approx(0.349, abs=0.003)
    # Without a fit: the middle of the four codes that each high half stands for.
    middle = four["biases"] + 1.5 * four["scales"]
    assert first < off(parts["weight"], 4 * four["scales"], middle, bits=2) - 0.01


def test_weights_that_are_not_finite_are_refused() -> None:
    arrays = matrix(np.zeros((2, 64), np.uint8), 64, "float32", 0)
    arrays["biases"][1, 0] = mx.inf
    with pytest.raises(CheckpointError, match="without planes") as refusal:
        split_planes(arrays, Quantization(4, 64, "affine"))
    assert refusal.value.remedy is Remedy.PACK_WITHOUT_PLANES


@pytest.mark.parametrize("wrong", [np.ones(63), np.full(64, -1), np.full(64, np.nan)])
def test_unsound_importance_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="importance has shape"):
        fit_line(words(np.zeros((2, 64), np.uint8), 4), 64, wrong.astype(np.float32))
