"""Kernels compute every pair from the planes that it asks for, whatever else is in its batch."""

from __future__ import annotations

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.kernels.backends import GpuKernels
from flash_moe.kernels.interface import Kernels, Memory, Shared
from flash_moe.kernels.native import load_native
from flash_moe.kernels.native_backend import NativeKernels
from flash_moe.kernels.spec import SLOT_MASK, U32, ExpertSpec
from flash_moe.native.build import find_compiler
from tests.devices import GPU, relative_difference
from tests.kernels.devices import KIND
from tests.stream.test_planes import make_case
from tests.stream.test_streamed import EXPERTS, HIDDEN, serve

pytestmark = pytest.mark.skipif(not GPU and find_compiler() is None, reason="no kernels here")

Pairs = list[list[int]]


class Watched:
    """This machine's kernels. Notes the slots of every call of `rows`; `slow` ones give way to
    MLX, as Metal's do where matrix instructions are quicker."""

    def __init__(self, slow: bool = False) -> None:
        self.kernels: Kernels = GpuKernels(KIND) if GPU else NativeKernels(load_native())
        self.mixture, self.combine = self.kernels.mixture, self.kernels.combine
        self.route = self.kernels.route
        self.slow = slow
        self.calls: Pairs = []

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        return self.slow

    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        self.calls.append(slots.tolist())
        return self.kernels.rows(lane, spec, x, tokens, slots)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("lane", [3, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_pair_from_its_planes(tokens: int, lane: int, slow: bool, tmp_path: Path) -> None:
    case, k, random = make_case(), 3, np.random.default_rng(tokens)
    kernels = Watched(slow)
    layer = serve(case.switch, case.layout, case.arrays, tmp_path, 2 * lane, kernels).layer
    assert layer.spec is not None
    x = mx.random.normal((tokens, HIDDEN))
    ids = np.array([random.choice(EXPERTS, k, replace=False) for _ in range(tokens)], np.uint32)
    weights = mx.random.uniform(shape=(tokens, k))
    for full in (random.random((tokens, k)) < 0.5, np.arange(k) < np.ones((tokens, 1)), None):
        marks = np.ones((tokens, k), bool) if full is None else full
        expected = case.expected(x, mx.array(ids), marks)
        mixed = (expected * weights[..., None]).sum(axis=-2)
        rows = layer.experts(x, mx.array(ids), full)
        assert relative_difference(rows, expected) <= 1e-4
        y = layer.mixture(x, ids, weights, Shared(), full)
        assert relative_difference(y, mixed) <= 1e-4
    assert bool(kernels.calls) != slow


def test_pairs_of_an_expert_lie_together_and_of_a_kind(tmp_path: Path) -> None:
    """As the kernels' tiles need them."""
    case, kernels = make_case(), Watched()
    layer = serve(case.switch, case.layout, case.arrays, tmp_path, 2 * EXPERTS, kernels).layer
    random = np.random.default_rng(1)
    ids = mx.array(random.integers(0, EXPERTS, (16, 4)), mx.uint32)
    mx.eval(layer.experts(mx.zeros((16, HIDDEN)), ids, random.random((16, 4)) < 0.5))
    (slots,) = kernels.calls
    changes = sum(a != b for a, b in itertools.pairwise(slots))
    assert changes == len(set(slots)) - 1
    places = [slot & int(SLOT_MASK) for slot in slots]
    assert places == sorted(places)
