"""The native kernels against float64 from the bits, on every SIMD path that this processor has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_moe.kernels.native import Native
from flash_moe.kernels.spec import GROUP_SIZES, SCALE_TYPES, ExpertSpec
from flash_moe.kernels.structs import RESIDENT_BITS, resident
from tests.kernels import reference as ref
from tests.kernels.native_cases import as_resident, random_matrix, scale_kinds, seeds, specs, within

examples = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(data=st.data(), seed=seeds)
@examples
def test_matmul(native: Native, data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group = data.draw(st.sampled_from(GROUP_SIZES))
    matrix, record = random_matrix(
        data.draw(st.integers(1, 90)),
        group * data.draw(st.integers(1, 24)),
        data.draw(st.sampled_from(RESIDENT_BITS)),
        group,
        data.draw(st.sampled_from(SCALE_TYPES)),
        rng,
    )
    x = rng.normal(size=(data.draw(st.integers(1, 9)), matrix.columns)).astype(np.float32)
    got = native.matmul(as_resident(matrix, record), x)
    zero = np.zeros(x.shape)
    want = ref.product(record, matrix, ref.Bounded(x.astype(np.float64), zero))
    assert within(got, want)


@given(spec=specs(), scales=scale_kinds, data=st.data(), seed=seeds)
@examples
def test_experts(
    native: Native, spec: ExpertSpec, scales: ref.Scales, data: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 10))
    tokens = data.draw(st.integers(1, max(1, 40 // k)))
    records = [ref.random_record(spec, rng, scales) for _ in range(count)]
    bank = memoryview(np.concatenate(records))
    slots = rng.integers(0, count, (tokens, k), np.uint32)
    x = rng.normal(size=(tokens, spec.hidden)).astype(np.float32)
    weights = rng.normal(size=(tokens, k)).astype(np.float32)
    got = native.experts(spec, bank, x, slots, weights)
    want = ref.mixture(records, spec, x.astype(np.float64), slots, weights.astype(np.float64))
    assert within(got, want)
    each = native.experts(spec, bank, x, slots)
    for t, j in np.ndindex(tokens, k):
        one = ref.expert(records[slots[t, j]], spec, x[t : t + 1].astype(np.float64))
        assert within(each[t, j], ref.Bounded(one.value[0], one.error[0]))


@given(spec=specs(), data=st.data(), seed=seeds)
@examples
def test_sum_batch_and_threads_change_no_bit(
    native: Native, spec: ExpertSpec, data: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count, k, tokens = (data.draw(st.integers(1, n)) for n in (5, 10, 40))
    bank = memoryview(np.concatenate([ref.random_record(spec, rng) for _ in range(count)]))
    slots = rng.integers(0, count, (tokens, k), np.uint32)
    x = rng.normal(size=(tokens, spec.hidden)).astype(np.float32)
    weights = rng.normal(size=(tokens, k)).astype(np.float32)
    got = []
    for threads in (1, 2, 5):
        native.threads = threads
        assert native.threads == threads
        got.append(native.experts(spec, bank, x, slots, weights))
    assert all(np.array_equal(got[0], other) for other in got)
    each = native.experts(spec, bank, x, slots)
    total = np.zeros_like(x)
    for j in range(k):
        total += weights[:, j, None] * each[:, j]
    assert np.array_equal(total, got[0])
    t = data.draw(st.integers(0, tokens - 1))
    one = [a[t : t + 1] for a in (x, slots, weights)]
    assert np.array_equal(native.experts(spec, bank, *one)[0], got[0][t])


def test_silu_to_the_last_bits(native: Native) -> None:
    """Identities for matrices, so that nothing but silu(x) * x rounds: exp, and three operations.
    The bounds of sums are too wide to see its errors."""
    size = 256
    spec = ref.make_spec(size, size, 8, 32, "float32")
    record = np.zeros(spec.stride, np.uint8)
    ones = np.ones(size * size // 32, np.float32).view(np.uint8)
    for matrix in (spec.gate, spec.up, spec.down):
        record[matrix.weight :][: size * size] = np.eye(size, dtype=np.uint8).reshape(-1)
        record[matrix.scales :][: ones.size] = ones
    x = np.linspace(-80, 120, 4 * size).reshape(4, size).astype(np.float32)
    got = native.experts(spec, memoryview(record), x, np.zeros((4, 1), np.uint32))[:, 0]
    exact = x.astype(np.float64)
    want = exact / (1 + np.exp(-exact)) * exact
    assert np.all(np.abs(got - want) <= 5 * 2.0**-24 * np.abs(want))


def test_more_tokens_than_fit_the_scratch(best: Native) -> None:
    """32 MiB of hidden states are 65,536 of 128; both paths, cut in chunks."""
    spec = ref.make_spec(32, 128, 2, 32)
    rng = np.random.default_rng(0)
    bank = memoryview(ref.random_record(spec, rng))
    x = rng.normal(size=(40_000, 32)).astype(np.float32)
    slots = np.zeros((len(x), 2), np.uint32)
    weights = np.ones(slots.shape, np.float32)
    got = best.experts(spec, bank, x, slots, weights)
    for t in (0, 32_767, 32_768, len(x) - 1):
        one = best.experts(spec, bank, x[t : t + 1], slots[:1], weights[:1])
        assert np.array_equal(got[t], one[0])
    each = best.experts(spec, bank, x, slots)
    assert np.array_equal(each[:, 0] + each[:, 1], got)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_16_bit_scale_is_exact(native: Native, kind: str) -> None:
    """Subnormal ones too: one code of 1 and one x of 1 leave the scale as it is."""
    raw = np.arange(1 << 16, dtype=np.uint16)
    infinite = 0x7C00 if kind == "float16" else 0x7F80
    raw = raw[raw & infinite != infinite].reshape(-1, 32)
    scales = raw.view(np.float16) if kind == "float16" else raw
    ones = np.full((len(raw), 32 * 32 // 4), 0x01010101, np.uint32)
    matrix = resident(ones, scales, np.zeros_like(scales), bits=8, group_size=32)
    values = ref.to_float(raw.view(np.uint8), kind)
    for g in (0, 13, 31):
        x = np.zeros((1, matrix.columns), np.float32)
        x[0, 32 * g] = 1
        assert np.array_equal(native.matmul(matrix, x)[0], values[:, g])


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(1, 20),
    st.booleans(),
)
@examples
def test_router(native: Native, row: list[float], k: int, tokens: int, renormalise: bool) -> None:
    logits = np.tile(np.array(row, np.float32), (tokens, 1))
    k = min(k, len(row))
    ids, weights = native.router(logits, k, renormalise)
    assert all(len(set(best)) == k and max(best) < len(row) for best in ids.tolist())
    ranks = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    want_ids, _ = ref.router(ranks, k, renormalise) if np.isfinite(ranks).all() else (None, None)
    order = np.argsort(-ranks, axis=-1, kind="stable")[:, :k]
    assert np.array_equal(ids, order)
    if want_ids is not None and not np.isnan(logits).any():
        # One rounding a term and one a sum of n terms; the difference of logits is rounded too.
        _, want = ref.router(ranks, k, renormalise)
        spread = np.ptp(ranks, axis=-1, keepdims=True)
        relative = ref.gamma(len(row) + 8) + min(float(spread.max()), 104.0) * 2.0**-23
        assert np.all(np.abs(weights - want) <= want * relative + 2.0**-140)
