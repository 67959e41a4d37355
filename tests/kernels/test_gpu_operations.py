"""The gated delta rule and its convolution as shaders, against float64; and the layer made of them
against mlx-lm's own. On this machine's GPU, or as Metal under the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.qwen3_5 import GatedDeltaNet, TextModelArgs

from flash_moe import upstream
from flash_moe.kernels.gpu_operations import (
    Gates,
    GpuGatedDelta,
    gated_delta,
    gated_delta_raw,
    short_conv,
)
from flash_moe.model.families.linear_attention import fuse
from tests.devices import relative_difference
from tests.kernels import reference as ref
from tests.kernels.devices import (
    EXAMPLES,
    F64,
    KIND,
    bits,
    kernels_run,
    same_in_all_schedules,
    to_mlx,
)
from tests.kernels.gpu_cases import DTYPES
from tests.kernels.native_cases import seeds
from tests.kernels.rules import in_float64, sigmoid

check = settings(max_examples=EXAMPLES, deadline=None)
# What a result may be off by, as a share of the largest, beside the rounding of the result itself:
# a state passes through up to 12 tokens.
CLOSE = 2e-5


@dataclass(frozen=True)
class Rule:
    """Sizes, and a rule's arrays in float64, of values that `dtype` can hold."""

    key_heads: int
    group: int
    tokens: int
    keys: int
    values: int
    dtype: str
    each_key: bool
    seed: int

    @property
    def heads(self) -> int:
        return self.key_heads * self.group

    def arrays(self) -> dict[str, F64]:
        rng = np.random.default_rng(self.seed)
        t, h = self.tokens, self.heads
        gate = (t, h, self.keys) if self.each_key else (t, h)
        made = {
            "q": rng.normal(size=(t, self.key_heads, self.keys)) * self.keys**-0.5,
            "k": rng.normal(size=(t, self.key_heads, self.keys)) * self.keys**-0.5,
            "v": rng.normal(size=(t, h, self.values)),
            "decay": rng.uniform(0, 1, gate),
            "beta": rng.uniform(0, 1, (t, h)),
        }
        made = {name: ref.rounded(array, self.dtype) for name, array in made.items()}
        state = rng.normal(size=(h, self.values, self.keys))
        return {**made, "state": ref.rounded(state, "float32")}


rules = st.builds(
    Rule,
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    tokens=st.integers(1, 12),
    keys=st.sampled_from([32, 64, 128]),
    values=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    each_key=st.booleans(),
    seed=seeds,
)


def assert_close(got: F64, want: F64, dtype: str) -> None:
    assert np.isfinite(got).all()
    largest = np.abs(want).max()
    allowed = CLOSE * largest + 2 * ref.UNIT[dtype] * np.abs(want) + ref.SMALLEST[dtype]
    assert (np.abs(got - want) <= allowed).all()


def on_device(rule: Rule, first: int, end: int, arrays: dict[str, F64]) -> list[mx.array]:
    return [
        to_mlx(arrays[name][first:end], rule.dtype)[None]
        for name in ("q", "k", "v", "decay", "beta")
    ]


@check
@given(rules, st.integers(0, 12))
def test_gated_delta(rule: Rule, cut: int) -> None:
    """In one call and, to the bit, in two; gates for heads or for every key."""
    arrays = rule.arrays()
    state = mx.array(arrays["state"].astype(np.float32))[None]

    def launch() -> list[mx.array]:
        return list(gated_delta(KIND, *on_device(rule, 0, rule.tokens, arrays), state))

    y, new = same_in_all_schedules(launch)
    for got, want, dtype in zip(
        (y[0], new[0]), in_float64(**arrays), (rule.dtype, "float32"), strict=True
    ):
        assert_close(got, want, dtype)
    cut = min(cut, rule.tokens - 1)
    if cut:
        with kernels_run():
            whole = launch()
            first, middle = gated_delta(KIND, *on_device(rule, 0, cut, arrays), state)
            second, last = gated_delta(KIND, *on_device(rule, cut, rule.tokens, arrays), middle)
            assert bits(mx.concatenate([first, second], axis=1)) == bits(whole[0])
            assert bits(last) == bits(whole[1])


@check
@given(rules, st.sampled_from([1.0, 20.0]))
def test_gated_delta_of_raw_projections(rule: Rule, magnitude: float) -> None:
    """Lengths, gates and the order of a row of queries, keys and values are the shader's. Gates
    also where exp overflows, or leaves nothing."""
    arrays, rng = rule.arrays(), np.random.default_rng(rule.seed)
    t, h, dtype = rule.tokens, rule.heads, rule.dtype
    decay, beta, step = (
        ref.rounded(rng.normal(size=size) * magnitude, dtype) for size in ((t, h), (t, h), (h,))
    )
    log_rate = ref.rounded(np.log(rng.uniform(0.01, 16, h)), "float32")
    mixed = np.concatenate([arrays[name].reshape(t, -1) for name in "qkv"], axis=1)
    state = mx.array(arrays["state"].astype(np.float32))[None]

    def launch() -> list[mx.array]:
        rows, a, b = (to_mlx(array, dtype)[None] for array in (mixed, decay, beta))
        gates = Gates(mx.array(log_rate.astype(np.float32)), to_mlx(step, dtype))
        return list(gated_delta_raw(KIND, rows, a, b, gates, state, rule.key_heads))

    y, new = same_in_all_schedules(launch)
    unit = {
        name: arrays[name] / np.sqrt((arrays[name] ** 2).sum(-1, keepdims=True) + 1e-6)
        for name in "qk"
    }
    shrink = np.exp(-np.exp(log_rate) * np.logaddexp(decay + step, 0))
    q, k = unit["q"] * rule.keys**-0.5, unit["k"]
    wanted = in_float64(q, k, arrays["v"], shrink, sigmoid(beta), arrays["state"])
    for got, want, kind in zip((y[0], new[0]), wanted, (dtype, "float32"), strict=True):
        assert_close(got, want, kind)


@check
@given(
    tokens=st.integers(1, 9),
    channels=st.integers(1, 300),
    taps=st.integers(2, 5),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_short_conv(tokens: int, channels: int, taps: int, dtype: str, seed: int) -> None:
    """With fewer tokens than taps, too, where some of the past stays the past."""
    rng = np.random.default_rng(seed)
    x, past, weight = (
        ref.rounded(rng.normal(size=size), dtype)
        for size in ((tokens, channels), (taps - 1, channels), (channels, taps))
    )

    def launch() -> list[mx.array]:
        arrays = (to_mlx(x, dtype)[None], to_mlx(past, dtype)[None])
        return list(short_conv(KIND, *arrays, to_mlx(weight, dtype)[..., None]))

    y, last = same_in_all_schedules(launch)
    joined = np.concatenate([past, x])
    sums = sum(joined[i : i + tokens] * weight[:, i] for i in range(taps))
    assert_close(y[0], sums * sigmoid(sums), dtype)
    assert (last[0] == joined[tokens:]).all()


SIZES = TextModelArgs(
    hidden_size=128,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=64,
    linear_value_head_dim=40,
)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("cuts", [[1] * 9, [6, 1, 2], [9]])
def test_the_fused_layer_is_mlx_lms(dtype: mx.Dtype, cuts: list[int]) -> None:
    """Rows and state, whatever the tokens come in; also from a state that mlx-lm left."""
    mx.random.seed(7)
    own, fused = GatedDeltaNet(SIZES), GatedDeltaNet(SIZES)
    own.dt_bias = mx.random.normal(own.dt_bias.shape)
    weights = tree_map(lambda array: array.astype(dtype), own.parameters())
    weights["A_log"] = own.A_log
    own.update(weights)
    fused.update(weights)
    assert fuse(fused, KIND)
    x = mx.random.normal((1, 9, 128)).astype(dtype)

    def run(layer: Any, cuts: list[int]) -> list[mx.array]:
        cache, rows, at = ArraysCache(size=2), [], 0
        for n in cuts:
            rows.append(layer(x[:, at : at + n], None, cache))
            at += n
        outputs = [mx.concatenate(rows, axis=1), cache[0], cache[1]]
        mx.eval(outputs)
        return outputs

    tolerance = 1e-5 if dtype == mx.float32 else 2.0**-5
    with kernels_run():
        for got, want in zip(run(fused, cuts), run(own, [9]), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert relative_difference(got, want) <= tolerance


def test_mlx_lm_computes_what_the_fused_layer_does_not() -> None:
    """Batches, masks, lengths, and calls that keep no state; other classes are left alone."""
    layer = GatedDeltaNet(SIZES)
    mx.eval(layer.parameters())
    x = mx.random.normal((2, 3, 128))
    masked = ArraysCache(size=2)
    lengths = ArraysCache(size=2)
    lengths.prepare(lengths=[2])
    mask = mx.array([[True, True, False]])
    calls: list[tuple[Any, ...]] = [(x,), (x[:1], mask, masked), (x[:1], None, lengths)]
    want = [layer(*call) for call in calls]
    masked.cache, lengths.cache = [None, None], [None, None]
    lengths.prepare(lengths=[2])
    assert fuse(layer, KIND)
    for call, expected in zip(calls, want, strict=True):
        assert mx.array_equal(layer(*call), expected)
    assert not fuse(layer, KIND), "a subclass may compute something else"


def test_mlx_lm_computes_the_other_deltas() -> None:
    """Masks, odd widths, several conversations, a state of 16 bits."""
    own = upstream.get(upstream.GATED_DELTA, "gated_delta_ops")
    calls: list[Any] = []

    def otherwise(*arrays: Any) -> Any:
        calls.append(arrays)
        return own(*arrays)

    rule = Rule(2, 2, 5, 32, 24, "float32", False, 1)
    made = rule.arrays()
    arrays = on_device(rule, 0, 5, made)
    state = mx.array(made["state"].astype(np.float32))[None]
    ours = GpuGatedDelta(otherwise, KIND)
    with kernels_run():
        for given_state in (state, None):
            results = ours(*arrays, given_state), own(*arrays, given_state)
            for got, want in zip(*results, strict=True):
                assert relative_difference(got, want) <= 1e-5
        assert not calls
        q, k, v, g, beta = arrays
        rest: list[list[Any]] = [
            [*arrays, state, mx.array([[True, False, True, True, False]])],
            [q[..., :24], k[..., :24], v, g, beta, state[..., :24]],
            [mx.concatenate([array, array]) for array in (*arrays, state)],
            [*arrays, state.astype(mx.float16)],
        ]
        for inputs in rest:
            for got, want in zip(ours(*inputs), own(*inputs), strict=True):
                assert relative_difference(got, want) <= 1e-5
    assert len(calls) == len(rest)
