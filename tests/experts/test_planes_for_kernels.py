"""Kernels are told of every pair which planes it is computed from, and where those lie."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.experts.streamed import StreamedSwitch
from flash_moe.kernels.fused import Memory
from flash_moe.kernels.gpu import U32, Extras
from flash_moe.kernels.spec import WHOLE, ExpertSpec, Matrix
from tests.experts.test_planes import make_case
from tests.experts.test_streamed import EXPERTS, HIDDEN, serve
from tests.kernels.reference import dequantize, unpack


@dataclass
class InFloat64:
    """What the kernels are to compute, from the lane's bytes and the spec alone."""

    wants_mlx: bool = False
    seen: list[tuple[int, int]] = field(default_factory=list)

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        return self.wants_mlx

    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        records = np.array(lane.words).view(np.uint8).reshape(-1, spec.stride)
        given, made = np.array(x, np.float64), []
        for token, slot in zip(tokens, slots.tolist(), strict=True):
            record, whole = records[slot & (WHOLE - 1)], slot >= WHOLE
            gate, up, down = (_weights(record, m, whole) for m in (spec.gate, spec.up, spec.down))
            opened = gate @ given[token]
            made.append(down @ (opened / (1 + np.exp(-opened)) * (up @ given[token])))
        self.seen.append((len(slots), int((slots >= WHOLE).sum())))
        return mx.array(np.array(made, np.float32))

    def mixture(
        self,
        lane: Memory,
        spec: ExpertSpec,
        x: mx.array,
        slots: U32,
        weights: mx.array,
        extras: Extras,
    ) -> mx.array:
        tokens = np.repeat(np.arange(len(slots)), slots.shape[1])
        rows = self.rows(lane, spec, x, tokens, slots.reshape(-1))
        return self.combine(rows, np.arange(slots.size), weights, extras, x.dtype)

    def combine(
        self, rows: mx.array, place: U32, weights: mx.array, extras: Extras, dtype: mx.Dtype
    ) -> mx.array:
        picked = rows[mx.array(place)].reshape(*weights.shape, -1)
        return (picked * weights[..., None]).sum(axis=-2)

    def route(self, logits: mx.array, k: int, renormalise: bool) -> tuple[mx.array, mx.array]:
        raise AssertionError("a switch layer routes nothing")


def _weights(record: np.ndarray, m: Matrix, whole: bool) -> np.ndarray:
    assert m.rest is not None
    assert m.bits == 2
    if not whole:
        return dequantize(record, m)
    size = m.rows * m.columns // 4
    high, low = (
        unpack(record[at : at + size].reshape(m.rows, -1), 2) for at in (m.weight, m.rest.weight)
    )
    groups = m.rows * m.columns // m.group_size * 4
    scale, bias = (
        np.repeat(record[at : at + groups].view(np.float32).reshape(m.rows, -1), m.group_size, 1)
        for at in (m.rest.scales, m.rest.biases)
    )
    return (4 * high + low) * scale.astype(np.float64) + bias


@pytest.mark.parametrize("wants_mlx", [False, True])
@pytest.mark.parametrize("lane", [3, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 9])
def test_kernels_are_told_of_every_pair(
    tokens: int, lane: int, wants_mlx: bool, tmp_path: Path
) -> None:
    case, k, random = make_case(), 3, np.random.default_rng(tokens)
    kernels = InFloat64(wants_mlx)
    streamed = serve(case.switch, case.layout, case.arrays, tmp_path, 2 * lane, kernels)
    assert streamed.fused
    x = mx.random.normal((tokens, HIDDEN))
    ids = np.array([random.choice(EXPERTS, k, replace=False) for _ in range(tokens)], np.uint32)
    weights = mx.random.uniform(shape=(tokens, k))
    for whole in (random.random((tokens, k)) < 0.5, np.arange(k) < np.ones((tokens, 1)), None):
        marks = np.ones((tokens, k), bool) if whole is None else whole
        expected = case.expected(x, mx.array(ids), marks)
        for got, wanted in (
            (streamed(x, mx.array(ids), whole), expected),
            (
                streamed.mixture(x, ids, weights, Extras(), whole),
                (expected * weights[..., None]).sum(axis=-2),
            ),
        ):
            assert mx.abs(got - wanted).max() <= 1e-4 * mx.abs(wanted).max()
        if not wants_mlx:
            assert [sum(n) for n in zip(*kernels.seen, strict=True)] == [
                2 * tokens * k,
                2 * marks.sum(),
            ]
        assert bool(kernels.seen) != wants_mlx
        kernels.seen.clear()


def test_pairs_of_an_expert_lie_together_and_of_a_kind(tmp_path: Path) -> None:
    """As the kernels' tiles want them."""
    case, kernels = make_case(), InFloat64()
    streamed: StreamedSwitch = serve(
        case.switch, case.layout, case.arrays, tmp_path, 2 * EXPERTS, kernels
    )
    given: list[list[int]] = []
    rows = kernels.rows

    def watched(lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32) -> mx.array:
        given.append(slots.tolist())
        return rows(lane, spec, x, tokens, slots)

    kernels.rows = watched  # type: ignore[method-assign]
    random = np.random.default_rng(1)
    ids = mx.array(random.integers(0, EXPERTS, (16, 4)), mx.uint32)
    mx.eval(streamed(mx.zeros((16, HIDDEN)), ids, random.random((16, 4)) < 0.5))
    (slots,) = given
    changes = sum(a != b for a, b in itertools.pairwise(slots))
    assert changes == len(set(slots)) - 1
    places = [slot % WHOLE for slot in slots]
    assert places == sorted(places)
