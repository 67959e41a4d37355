"""The fit gives the same bits in other circumstances, and checks its arguments."""

from __future__ import annotations

import platform
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.errors import CheckpointError, Remedy
from flash_moe.native.build import find_compiler
from flash_moe.pack.fit import PIECE, Fit, NotFinite, load_fit
from tests.kernels.test_native_memory import Guarded
from tests.pack.fits import METHODS

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def fit() -> Fit:
    return load_fit()


# -- the same bits, whatever the circumstances --------------------------------------------------


def big(rng: np.random.Generator, rows: int = 700) -> tuple[Any, ...]:
    packed = rng.integers(0, 2**32, (rows, 512 * 4 // 32), dtype=np.uint32)
    scales = rng.integers(0x3C00, 0x3D00, (rows, 8)).astype(np.uint16)
    return packed, scales, scales + 77, rng.random(512, np.float32)


def both(fit: Fit, data: tuple[Any, ...], threads: int = 1, rows: slice = slice(None)) -> list[Any]:
    packed, scales, biases, importance = data
    values = packed.view(np.uint8).astype(np.float32)
    results: list[Any] = []
    for bits, group in ((2, 64), (2, 128), (3, 64), (3, 128)):
        results += fit.codes(
            *(part[rows] for part in (packed, scales, biases)),
            source_bits=4,
            source_group=64,
            bits=bits,
            group_size=group,
            importance=importance,
            threads=threads,
        )
        results += fit.values(
            values[rows], bits=bits, group_size=group, scale_type="bfloat16", threads=threads
        )
    return results


def test_threads_and_neighbours_change_nothing(fit: Fit) -> None:
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
        fitted = fit.codes(packed, scales, biases, importance=weights, **known)
        assert all(map(np.array_equal, fitted, plain))
    once, twice = (
        fit.codes(packed, scales, biases, importance=importance * f, **known)
        for f in (np.float32(1), np.float32(2**40))
    )
    assert all(map(np.array_equal, once, twice))
    assert not np.array_equal(once[1], plain[1])


# -- refusals -----------------------------------------------------------------------------------


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
        ({"values": np.zeros((2, 100), np.float32)}, "100 columns are not whole groups"),
        ({"values": np.zeros((2, 128))}, "values is float64"),
        ({"values": np.zeros(128, np.float32)}, "values has shape"),
        ({"scale_type": "float8"}, "scale_type='float8'"),
    ]:
        with pytest.raises(ValueError, match=name):
            fit.values(**{**values, **change})
    assert fit.values(**{**values, "values": np.zeros((0, 128), np.float32)})[0].shape == (0, 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers(method: str, wrong: float, fit: Fit) -> None:
    values = np.zeros((3, 128), np.float32)
    values[1, 70] = wrong
    with pytest.raises(CheckpointError, match="infinite or not a number") as refusal:
        METHODS[method]({"weight": mx.array(values)}, None, 2, 64)
    assert refusal.value.remedy is Remedy.PACK_WITHOUT_BITS
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
        with pytest.raises(ValueError, match="importance"):
            METHODS[method](arrays, None, 2, 64, wrong)
