"""The fit against brute force in float64, against minmax, against itself in other circumstances."""

from __future__ import annotations

import platform
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flash_moe.errors import CheckpointError, OptionError
from flash_moe.format.layout import Quantization
from flash_moe.native.build import find_compiler
from flash_moe.pack.affine import pack_codes
from flash_moe.pack.cuts import table
from flash_moe.pack.fit import PIECE, STORED, Fit, Fitted, NotFinite, load_fit
from flash_moe.pack.requantize import METHODS, requantize
from tests.kernels.test_native_memory import Guarded

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")

F64 = npt.NDArray[np.float64]
# What a group may be like; the rows of a matrix are one of each.
KINDS = ("normal", "heavy", "uniform", "constant", "pair", "clusters", "three", "outlier", "ends")
# And the importance of its columns.
WEIGHINGS = ("none", "even", "uneven", "zeros", "one", "wide", "nothing")


@pytest.fixture(scope="module")
def fit() -> Fit:
    return load_fit()


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
    """Every way to give 16 ordered codes one of four rising levels: [969, 16]."""
    starts = combinations_with_replacement(range(17), 3)
    return np.array([[sum(c >= s for s in cut) for c in range(16)] for cut in starts])


def least_error(codes: npt.NDArray[np.uint8], weights: F64) -> F64:
    """Of each group [n, size], by trying all partitions with their best scale and bias."""
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


def found(made: tuple[mx.array, ...], bits: int, group: int) -> F64:
    """The weights that MLX's arrays stand for."""
    codes, scales, biases = (
        np.array(part if part.dtype == mx.uint32 else part.astype(mx.float32)) for part in made
    )
    return levels((codes, scales, biases), bits, group)


def errors(values: F64, found: F64, importance: Any, group: int) -> F64:
    """Weighted, of every group."""
    columns = values.shape[1]
    weights = np.ones(columns) if importance is None else importance.astype(np.float64)
    weights = np.where(np.repeat(weights.reshape(-1, group).sum(1), group) > 0, weights, 1)
    return ((values - found) ** 2 * weights).reshape(len(values), -1, group).sum(-1)


def four_bits(
    rng: np.random.Generator, kind: str, columns: int, group: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32], Any, Any]:
    """Codes of rows of every kind, packed, and scales and biases of a type."""
    codes = np.array([np.rint(shape_like(k, columns, rng) * 15) for k in KINDS], np.uint8)
    shape = (len(KINDS), columns // group)
    scales = mx.array(rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-3, 0, shape))
    biases = mx.array(rng.normal(size=shape) * 3)
    stored = [mx.array(part).astype(getattr(mx, kind)) for part in (scales, biases)]
    if kind == "bfloat16":
        stored = [part.view(mx.uint16) for part in stored]
    packed = np.array(pack_codes(mx.array(codes), 4))
    return codes, packed, *(np.array(part) for part in stored)


# -- two bits of four: the optimum --------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from(WEIGHINGS), st.sampled_from([64, 128]))
@settings(max_examples=40, deadline=None)
def test_two_bits_of_four_are_the_optimum(fit_seed: int, weighing: str, group: int) -> None:
    """Scales are float32 here, so that rounding them hides nothing."""
    rng = np.random.default_rng(fit_seed)
    codes, packed, scales, biases = four_bits(rng, "float32", 256, group)
    biases *= 0
    importance = importance_like(weighing, 256, rng)
    made = load_fit().codes(
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
    got = errors(values, levels(made, 2, group), importance, group).reshape(-1)
    weights = np.ones(256) if importance is None else importance.astype(np.float64)
    weights = np.where(np.repeat(weights.reshape(-1, group).sum(1), group) > 0, weights, 1)
    rows = np.tile(weights, (len(KINDS), 1)).reshape(-1, group)
    least = least_error(codes.reshape(-1, group), rows) * wide(scales).reshape(-1) ** 2
    # What float32 adds: 1e-7 of a step of the source for each weight, squared.
    slack = rows.sum(1) * (wide(scales).reshape(-1) * 15 * 1e-6) ** 2
    assert np.all(got <= least * (1 + 1e-4) + slack)
    assert np.all(got >= least * (1 - 1e-9) - slack)


def test_the_table_is_smaller_than_all_partitions() -> None:
    """And what it leaves out is never better, as above: of 816 cuts of 16 bins, 261 are tried."""
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


def matrix(
    rng: np.random.Generator,
    source: int | None,
    group: int,
    dtype: str,
    scale: float,
    center: float,
) -> tuple[dict[str, mx.array], Quantization | None, mx.array]:
    values = np.array([shape_like(k, 256, rng) for k in KINDS])
    return given_as((center + scale * values).astype(np.float32), source, group, dtype)


def given_as(
    values: npt.NDArray[np.float32], source: int | None, group: int, dtype: str
) -> tuple[dict[str, mx.array], Quantization | None, mx.array]:
    """As mlx-lm has it, its quantization, and what the values are then, in float32."""
    x = mx.array(values).astype(getattr(mx, dtype))
    if source is None:
        return {"weight": x}, None, x.astype(mx.float32)
    weight, scales, biases = mx.quantize(x, group_size=group, bits=source)
    arrays = {"weight": weight, "scales": scales, "biases": biases}
    wide32 = [part.astype(mx.float32) for part in (scales, biases)]
    plain = mx.dequantize(weight, *wide32, group_size=group, bits=source)
    return arrays, Quantization(source, group, "affine"), plain


@given(
    seed=st.integers(0, 2**32 - 1),
    path=st.sampled_from(PATHS),
    dtype=st.sampled_from(sorted(STORED)),
    scale=st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 3e4]),
    center=st.sampled_from([0.0, -0.01, 1.0, -3e4]),
    weighing=st.sampled_from(WEIGHINGS),
    method=st.sampled_from(["fit", "fit in MLX"]),
)
@settings(max_examples=100, deadline=None)
@example(0, (4, 2, 64, 64), "float16", 3e4, -3e4, "none", "fit")
@example(0, (4, 2, 64, 64), "float16", 1e-6, 0.0, "none", "fit")
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
    made = requantize(arrays, quantization, bits, group, method, importance)
    base = requantize(arrays, quantization, bits, group, "minmax")
    assert [part.dtype for part in made] == [mx.uint32, getattr(mx, dtype), getattr(mx, dtype)]
    assert [part.shape for part in made] == [part.shape for part in base]
    exact = np.array(values, np.float64)
    assert np.all(np.isfinite(found(made, bits, group)))
    got, worst = (errors(exact, found(m, bits, group), importance, group) for m in (made, base))
    # float32 tells no weights of a group apart that differ by less.
    largest = np.repeat(np.abs(exact.reshape(len(exact), -1, group)).max(-1), group, axis=1)
    noise = 3e-7 * np.sqrt(errors(largest, 0 * exact, importance, group))
    assert np.all(np.sqrt(got) <= np.sqrt(worst) * (1 + 1e-5) + noise)
    codes = unpack(np.array(made[0]), bits)
    scales, biases = (
        np.repeat(np.array(part.astype(mx.float32), np.float64), group, axis=1) for part in made[1:]
    )
    some = scales != 0
    wanted = (exact - biases) / np.where(some, scales, 1)
    far = np.abs(codes - np.clip(wanted, 0, 2**bits - 1))
    noise = 1e-6 * (np.abs(exact) + np.abs(biases)) / np.where(some, np.abs(scales), 1)
    assert np.all((far <= 0.5 + 1e-4 + noise) | ~some)  # without a scale, any code will do


@pytest.mark.parametrize("dtype", sorted(STORED))
def test_scales_are_rounded_as_mlx_rounds_them(dtype: str, fit: Fit) -> None:
    """Of zeros and one other value, the scale is a third of it."""
    rng = np.random.default_rng(3)
    high = (rng.normal(size=4096) * 10.0 ** rng.uniform(-7, 3, 4096)).astype(np.float32)
    values = np.zeros((4096, 64), np.float32)
    values[:, ::2] = high[:, None]
    scales = wide(fit.values(values, bits=2, group_size=64, scale_type=dtype)[1]).reshape(-1)
    step = (np.abs(high.astype(np.float64)) / 3).astype(np.float32)
    expected = mx.array(step).astype(getattr(mx, dtype)).astype(mx.float32)
    # Rounded once here; there to float32 before, which may make a tie of what is none.
    assert np.mean(scales == np.array(expected)) > 0.999


# -- the same bits, whatever the circumstances --------------------------------------------------


def big(rng: np.random.Generator, rows: int = 700) -> tuple[Any, ...]:
    packed = rng.integers(0, 2**32, (rows, 512 * 4 // 32), dtype=np.uint32)
    scales = rng.integers(0x3C00, 0x3D00, (rows, 8)).astype(np.uint16)
    return packed, scales, scales + 77, rng.random(512, np.float32)


def both(fit: Fit, data: tuple[Any, ...], threads: int = 1, rows: slice = slice(None)) -> list[Any]:
    packed, scales, biases, importance = data
    values = packed.view(np.uint8).astype(np.float32)
    made: list[Any] = []
    for bits, group in ((2, 64), (2, 128), (3, 64), (3, 128)):
        made += fit.codes(
            *(part[rows] for part in (packed, scales, biases)),
            source_bits=4,
            source_group=64,
            bits=bits,
            group_size=group,
            importance=importance,
            threads=threads,
        )
        made += fit.values(
            values[rows], bits=bits, group_size=group, scale_type="bfloat16", threads=threads
        )
    return made


def test_threads_runs_and_neighbours_change_nothing(fit: Fit) -> None:
    data = big(np.random.default_rng(1))
    assert data[1].size > PIECE  # more than one piece
    one = both(fit, data)
    for threads in (1, 2, 7):
        assert all(map(np.array_equal, both(fit, data, threads), one))
    for rows in (slice(0, 1), slice(3, 8), slice(691, 700)):
        some = both(fit, data, rows=rows)
        assert all(np.array_equal(a, b[rows]) for a, b in zip(some, one, strict=True))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors_make_the_same_pack(flag: str, fit: Fit) -> None:
    data = big(np.random.default_rng(2))
    assert all(map(np.array_equal, both(load_fit((flag,)), data), both(fit, data)))


def test_nothing_beyond_the_arrays_is_read(fit: Fit) -> None:
    packed, scales, biases, importance = big(np.random.default_rng(3), 5)
    plain: dict[str, Any] = {"source_bits": 4, "source_group": 64, "bits": 2, "group_size": 64}
    guarded = [Guarded(part).array for part in (packed, scales, biases, importance)]
    got = fit.codes(*guarded[:3], importance=guarded[3], **plain)
    want = fit.codes(packed, scales, biases, importance=importance, **plain)
    assert all(map(np.array_equal, got, want))
    three = Guarded(packed[:, : 512 * 3 // 32]).array
    fit.codes(three, *guarded[1:3], source_bits=3, source_group=64, bits=2, group_size=128)
    values = Guarded(importance.reshape(4, 128)).array
    fit.values(values, bits=2, group_size=64, scale_type="float16")


def test_weights_count_by_their_ratio_alone(fit: Fit) -> None:
    packed, scales, biases, importance = big(np.random.default_rng(4), 20)
    known: dict[str, Any] = {"source_bits": 4, "source_group": 64, "bits": 2, "group_size": 64}
    plain = fit.codes(packed, scales, biases, **known)
    for weights in (np.full(512, 3, np.float32), np.zeros(512, np.float32)):
        made = fit.codes(packed, scales, biases, importance=weights, **known)
        assert all(map(np.array_equal, made, plain))
    once, twice = (
        fit.codes(packed, scales, biases, importance=importance * f, **known)
        for f in (np.float32(1), np.float32(2**40))
    )
    assert all(map(np.array_equal, once, twice))
    assert not np.array_equal(once[1], plain[1])


# -- the fallback -------------------------------------------------------------------------------


@pytest.mark.parametrize("weighing", ["none", "uneven"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("source", [4, None])
def test_the_fallback_is_nearly_as_good(source: int | None, bits: int, weighing: str) -> None:
    """The root mean square error is within 2 %: at times less, where neither is the optimum."""
    if source == bits:
        return
    rng = np.random.default_rng(5)
    for values in (rng.standard_normal((64, 512)), rng.standard_t(4, (64, 512))):
        arrays, quantization, plain = given_as(values.astype(np.float32), source, 64, "bfloat16")
        importance = importance_like(weighing, 512, rng)
        native, fallback = (
            np.sqrt(
                errors(np.array(plain, np.float64), found(made, bits, 64), importance, 64).mean()
            )
            for made in (
                requantize(arrays, quantization, bits, 64, method, importance)
                for method in ("fit", "fit in MLX")
            )
        )
        assert 0.98 < fallback / native < 1.02


# -- what is refused ----------------------------------------------------------------------------


def test_wrong_arguments_are_named(fit: Fit) -> None:
    packed, scales, biases, importance = big(np.random.default_rng(6), 4)
    codes: dict[str, Any] = {
        "weight": packed,
        "scales": scales,
        "biases": biases,
        "source_bits": 4,
        "source_group": 64,
        "bits": 2,
        "group_size": 64,
    }
    for change, name in [
        ({"bits": 5}, "bits=5"),
        ({"bits": 4}, "bits=4 are not fewer"),
        ({"source_bits": 8}, "source_bits=8"),
        ({"group_size": 32}, "group_size=32"),
        ({"source_group": 16}, "source_group=16"),
        ({"source_group": 128}, "weight has shape"),
        ({"threads": 0}, "threads=0"),
        ({"weight": packed.astype(np.int32)}, "weight is int32"),
        ({"weight": packed[:, :-1]}, "weight has shape"),
        ({"scales": scales.astype(np.float64)}, "scales are not"),
        ({"scales": scales[0]}, "scales have 1 dim"),
        ({"biases": biases[:, :-1]}, "biases has shape"),
        ({"biases": biases.astype(np.float16)}, "biases is float16"),
        ({"importance": importance[:-1]}, "importance has shape"),
        ({"importance": importance.astype(np.float64)}, "importance is float64"),
        ({"importance": -importance}, "importance has numbers"),
        ({"importance": importance * np.inf}, "importance has numbers"),
    ]:
        with pytest.raises(ValueError, match=name):
            fit.codes(**{**codes, **change})
    values: dict[str, Any] = {
        "values": np.zeros((2, 128), np.float32),
        "bits": 2,
        "group_size": 64,
        "scale_type": "bfloat16",
    }
    for change, name in [
        ({"values": np.zeros((2, 100), np.float32)}, "values have 100 columns"),
        ({"values": np.zeros((2, 128))}, "values is float64"),
        ({"values": np.zeros(128, np.float32)}, "values has shape"),
        ({"scale_type": "float8"}, "scale_type='float8'"),
    ]:
        with pytest.raises(ValueError, match=name):
            fit.values(**{**values, **change})
    assert fit.values(**{**values, "values": np.zeros((0, 128), np.float32)})[0].shape == (0, 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(method: str, wrong: float, fit: Fit) -> None:
    values = np.zeros((3, 128), np.float32)
    values[1, 70] = wrong
    with pytest.raises(CheckpointError, match="infinite or not a number"):
        requantize({"weight": mx.array(values)}, None, 2, 64, method)
    packed, scales, biases, _ = big(np.random.default_rng(7), 4)
    scales = scales.astype(np.float32)
    scales[3, 7] = wrong
    with pytest.raises(NotFinite):
        fit.codes(
            packed,
            scales,
            biases.astype(np.float32),
            source_bits=4,
            source_group=64,
            bits=2,
            group_size=64,
        )


@pytest.mark.parametrize("method", METHODS)
def test_importance_is_checked(method: str) -> None:
    arrays = {"weight": mx.zeros((2, 128))}
    for wrong in (np.ones(64, np.float32), np.full(128, -1, np.float32)):
        with pytest.raises((ValueError, OptionError), match="importance"):
            requantize(arrays, None, 2, 64, method, wrong)
