"""Kernels compute every pair from the planes that it wants, whoever else is in its batch."""

from __future__ import annotations

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.kernels.backends import Memory, NativeKernels
from flash_moe.kernels.gpu import U32, Extras
from flash_moe.kernels.native import load_native
from flash_moe.kernels.spec import WHOLE, ExpertSpec
from flash_moe.stream.streamed import StreamedSwitch
from tests.stream.test_planes import make_case
from tests.stream.test_streamed import EXPERTS, HIDDEN, serve


class PrefersMLX(NativeKernels):
    """As Metal's do where matrix instructions are quicker."""

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        return True


@pytest.mark.parametrize("kernels", [NativeKernels, PrefersMLX])
@pytest.mark.parametrize("lane", [3, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_pair_from_its_planes(
    tokens: int, lane: int, kernels: type[NativeKernels], tmp_path: Path
) -> None:
    case, k, random = make_case(), 3, np.random.default_rng(tokens)
    made = kernels(load_native())
    streamed = serve(case.switch, case.layout, case.arrays, tmp_path, 2 * lane, made)
    assert streamed.fused
    x = mx.random.normal((tokens, HIDDEN))
    ids = np.array([random.choice(EXPERTS, k, replace=False) for _ in range(tokens)], np.uint32)
    weights = mx.random.uniform(shape=(tokens, k))
    for whole in (random.random((tokens, k)) < 0.5, np.arange(k) < np.ones((tokens, 1)), None):
        marks = np.ones((tokens, k), bool) if whole is None else whole
        expected = case.expected(x, mx.array(ids), marks)
        mixed = (expected * weights[..., None]).sum(axis=-2)
        for got, wanted in (
            (streamed(x, mx.array(ids), whole), expected),
            (streamed.mixture(x, ids, weights, Extras(), whole), mixed),
        ):
            assert mx.abs(got - wanted).max() <= 1e-4 * mx.abs(wanted).max()


class Watched(NativeKernels):
    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        seen.append(slots.tolist())
        return super().rows(lane, spec, x, tokens, slots)


seen: list[list[int]] = []


def test_pairs_of_an_expert_lie_together_and_of_a_kind(tmp_path: Path) -> None:
    """As the kernels' tiles want them."""
    case = make_case()
    streamed: StreamedSwitch = serve(
        case.switch, case.layout, case.arrays, tmp_path, 2 * EXPERTS, Watched(load_native())
    )
    random = np.random.default_rng(1)
    ids = mx.array(random.integers(0, EXPERTS, (16, 4)), mx.uint32)
    mx.eval(streamed(mx.zeros((16, HIDDEN)), ids, random.random((16, 4)) < 0.5))
    (slots,) = seen
    changes = sum(a != b for a, b in itertools.pairwise(slots))
    assert changes == len(set(slots)) - 1
    places = [slot % WHOLE for slot in slots]
    assert places == sorted(places)
