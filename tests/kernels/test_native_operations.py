"""Attention and the gated delta rule in C, against float64; and where MLX computes them instead."""

from __future__ import annotations

import sys
import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_moe import upstream
from flash_moe.kernels.native import Native
from flash_moe.kernels.native_operations import NativeAttention, NativeGatedDelta
from flash_moe.kernels.spec import F32
from tests.kernels.native_cases import seeds
from tests.kernels.rules import in_float64
from tests.kernels.test_native_memory import Guarded

SIZES = st.tuples(
    st.integers(1, 3),  # heads of keys
    st.integers(1, 5),  # heads of queries for each
    st.integers(1, 9) | st.integers(60, 80),  # rows
    st.integers(0, 12) | st.integers(240, 530),  # keys beyond those of the rows
    st.sampled_from([32, 64, 96, 128, 256]),  # columns
)


def reference(q: F32, k: F32, v: F32, scale: float, causal: bool) -> np.ndarray:
    (heads, rows, _), (kv_heads, keys, _) = q.shape, k.shape
    wide = [np.repeat(array.astype(np.float64), heads // kv_heads, axis=0) for array in (k, v)]
    scores = scale * (q.astype(np.float64) @ wide[0].swapaxes(1, 2))
    if causal:
        hidden = np.arange(keys) > np.arange(rows)[:, None] + keys - rows
        scores[:, hidden] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ wide[1])


def inputs(sizes: tuple[int, ...], seed: int, magnitude: float = 1.0) -> tuple[F32, F32, F32]:
    kv_heads, group, rows, more, columns = sizes
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(kv_heads * group, rows, columns)) * magnitude
    k, v = rng.normal(size=(2, kv_heads, rows + more, columns))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


@given(SIZES, seeds, st.booleans(), st.sampled_from([0.1, 1.0, 30.0]))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_attention(
    native: Native, sizes: tuple[int, ...], seed: int, causal: bool, magnitude: float
) -> None:
    """Also with scores of hundreds, of which the largest alone is left."""
    q, k, v = inputs(sizes, seed, magnitude)
    scale = sizes[-1] ** -0.5
    got = native.attention(q, k, v, scale, causal)
    # A score is off by some units of float32, and its exponential by as many times as much.
    most = np.abs(scale * (q.astype(np.float64) @ np.repeat(k, sizes[1], 0).swapaxes(1, 2))).max()
    assert np.abs(got - reference(q, k, v, scale, causal)).max() <= 1e-5 * (1 + most)


@given(SIZES, seeds, st.integers(1, 5))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_row_depends_on_nothing_but_what_it_sees(
    native: Native, sizes: tuple[int, ...], seed: int, threads: int
) -> None:
    """To the bit: not on the rows of its batch, on later keys, on how keys lie, or on threads."""
    q, k, v = inputs(sizes, seed)
    rows, keys = q.shape[1], k.shape[1]
    together = native.attention(q, k, v, 0.1, causal=True)
    before = native.threads
    native.threads = threads
    try:
        for row in {0, rows // 2, rows - 1}:
            seen = keys - rows + row + 1
            room = np.full((2, k.shape[0], seen + 7, k.shape[2]), np.nan, np.float32)
            room[0, :, :seen], room[1, :, :seen] = k[:, :seen], v[:, :seen]
            alone = native.attention(
                q[:, row : row + 1], room[0, :, :seen], room[1, :, :seen], 0.1, causal=False
            )
            assert np.array_equal(alone[:, 0], together[:, row])
    finally:
        native.threads = before


@pytest.mark.parametrize("keys", [1, 5, 256, 257])
def test_nothing_beyond_the_keys_is_read(native: Native, keys: int) -> None:
    q, k, v = inputs((1, 3, 1, keys - 1, 64), keys)
    guarded = [Guarded(array).array for array in (q, k, v)]
    want = reference(q, k, v, 0.1, causal=False)
    assert np.allclose(native.attention(*guarded, 0.1, causal=False), want, atol=1e-5)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, 1, 48), (2, 3, 48), (2, 3, 48), "heads of 48 columns"),
        ((2, 1, 288), (2, 3, 288), (2, 3, 288), "heads of 288 columns"),
        ((3, 1, 32), (2, 3, 32), (2, 3, 32), "3 for 2"),
        ((2, 4, 32), (2, 3, 32), (2, 3, 32), "4 rows that see up to 3 keys"),
        ((2, 0, 32), (2, 3, 32), (2, 3, 32), "0 rows"),
        ((2, 1, 32), (2, 3, 64), (2, 3, 32), "k has shape"),
        ((2, 1, 32), (2, 3, 32), (2, 4, 32), "v has shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    native: Native, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str
) -> None:
    arrays = [np.zeros(shape, np.float32) for shape in (q, k, v)]
    with pytest.raises(ValueError, match=message):
        native.attention(*arrays, 0.1, causal=True)
    with pytest.raises(ValueError, match="float64"):
        native.attention(*(np.zeros((1, 1, 32)) for _ in "qkv"), 0.1, causal=True)


def test_mlx_computes_the_rest(native: Native, on_cpu: None) -> None:
    """Masks that are arrays, sinks, 16 bits, several conversations, odd widths."""
    calls: list[Any] = []

    def otherwise(*arrays: mx.array, **options: Any) -> mx.array:
        calls.append(options)
        return own(*arrays, **options)

    own = mx.fast.scaled_dot_product_attention
    attend = NativeAttention(native, otherwise)
    q, k = mx.random.normal((1, 4, 5, 32)), mx.random.normal((1, 2, 9, 32))
    for mask in (None, "causal"):
        got = attend(q, k, k, scale=0.2, mask=mask)
        assert mx.allclose(got, own(q, k, k, scale=0.2, mask=mask), atol=1e-5)
    assert not calls
    half, wide = (q.astype(mx.float16), k.astype(mx.float16)), (q[..., :16], k[..., :16])
    rest: list[tuple[mx.array, mx.array, dict[str, Any]]] = [
        (q, k, {"mask": mx.zeros((5, 9))}),
        (q, k, {"mask": None, "sinks": mx.ones(4)}),
        (*half, {"mask": "causal"}),
        (*wide, {"mask": "causal"}),
        (mx.concatenate([q, q]), mx.concatenate([k, k]), {"mask": "causal"}),
    ]
    for queries, keys, options in rest:
        got = attend(queries, keys, keys, scale=0.2, **options)
        assert mx.array_equal(got, own(queries, keys, keys, scale=0.2, **options))
    assert len(calls) == len(rest)


DELTAS = st.tuples(
    st.integers(1, 3),  # heads of keys
    st.integers(1, 4),  # heads of values for each
    st.integers(1, 12),  # tokens
    st.sampled_from([16, 32, 64, 128]),  # keys
    st.integers(1, 40),  # values
)


def delta_inputs(sizes: tuple[int, ...], seed: int) -> list[F32]:
    key_heads, group, tokens, keys, values = sizes
    heads, rng = key_heads * group, np.random.default_rng(seed)
    q, k = rng.normal(size=(2, tokens, key_heads, keys)) * keys**-0.5
    v = rng.normal(size=(tokens, heads, values))
    g, beta = rng.uniform(0, 1, (2, tokens, heads))
    state = rng.normal(size=(heads, values, keys))
    return [array.astype(np.float32) for array in (q, k, v, g, beta, state)]


@given(DELTAS, seeds, st.integers(1, 5), st.integers(0, 12))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_gated_delta(
    native: Native, sizes: tuple[int, ...], seed: int, threads: int, cut: int
) -> None:
    """In one call or, to the bit, in two, on any number of threads; the old state stays."""
    arrays = delta_inputs(sizes, seed)
    *inputs, state = arrays
    before = state.copy()
    y, new = native.gated_delta(*arrays)
    for got, want in zip((y, new), in_float64(*arrays), strict=True):
        assert np.abs(got - want).max() <= 1e-4
    threads, native.threads = native.threads, threads
    try:
        first, middle = native.gated_delta(*(array[:cut] for array in inputs), state)
        second, last = native.gated_delta(*(array[cut:] for array in inputs), middle)
    finally:
        native.threads = threads
    assert np.array_equal(np.concatenate([first, second]), y)
    assert np.array_equal(last, new)
    assert np.array_equal(state, before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": (2, 2, 24), "k": (2, 2, 24)}, "heads of 24 keys"),
        ({"q": (2, 3, 32), "k": (2, 3, 32)}, "4 for 3"),
        ({"k": (1, 2, 32)}, "k has shape"),
        ({"g": (2, 4, 32)}, "g has shape"),
        ({"state": (4, 9, 32)}, "state has shape"),
    ],
)
def test_deltas_that_do_not_fit_are_refused(
    native: Native, changed: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {"q": (2, 2, 32), "k": (2, 2, 32), "v": (2, 4, 8), "g": (2, 4), "beta": (2, 4)}
    shapes = {**shapes, "state": (4, 8, 32), **changed}
    with pytest.raises(ValueError, match=message):
        native.gated_delta(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def test_mlx_lm_computes_the_other_deltas(native: Native, on_cpu: None) -> None:
    """Masks, gates for every key, odd widths and several conversations."""
    own = upstream.get(upstream.GATED_DELTA, "gated_delta_ops")
    calls: list[Any] = []

    def otherwise(*arrays: Any) -> Any:
        calls.append(arrays)
        return own(*arrays)

    ours = NativeGatedDelta(otherwise, native)
    arrays = [mx.array(array)[None] for array in delta_inputs((2, 2, 5, 32, 24), 1)]
    for given_state in (arrays[5], None):
        for got, want in zip(
            ours(*arrays[:5], given_state), own(*arrays[:5], given_state), strict=True
        ):
            assert mx.allclose(got, want, atol=1e-5)
    assert not calls
    q, k, v, g, beta, state = arrays
    rest: list[list[Any]] = [
        [*arrays, mx.array([[True, False, True, True, False]])],
        [q, k, v, mx.broadcast_to(g[..., None], (1, 5, 4, 32)), beta, state],
        [q[..., :24], k[..., :24], v, g, beta, state[..., :24]],
        [mx.concatenate([array, array]) for array in arrays],
    ]
    for inputs in rest:
        for got, want in zip(ours(*inputs), own(*inputs), strict=True):
            assert mx.array_equal(got, want)
    assert len(calls) == len(rest)


def test_operations_are_ours_in_one_thread_and_put_back() -> None:
    delta = sys.modules[upstream.GATED_DELTA]
    own = mx.fast.scaled_dot_product_attention, delta.gated_delta_ops
    seen = []

    def call() -> None:
        arrays = [mx.zeros((1, 1, 1, 8))] * 3
        seen.append(mx.fast.scaled_dot_product_attention(*arrays, scale=1.0).shape)
        gates = [mx.zeros((1, 1, 1))] * 2
        seen.append(delta.gated_delta_ops(*arrays, *gates)[0].shape)

    def marked(result: Any) -> Any:
        return lambda otherwise: lambda *_, **__: result

    def call_here_and_elsewhere() -> None:
        with upstream.operations(
            attention=marked(mx.zeros(7)), gated_delta=marked([mx.zeros((7, 7))])
        ):
            call()
            other = threading.Thread(target=call)
            other.start()
            other.join()
            raise KeyError

    with pytest.raises(KeyError):
        call_here_and_elsewhere()
    assert seen == [(7,), (7, 7), (1, 1, 1, 8), (1, 1, 1, 8)]
    assert own == (mx.fast.scaled_dot_product_attention, delta.gated_delta_ops)
