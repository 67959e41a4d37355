"""Records in two planes: full pairs equal what the 4-bit kernel computes from the joined codes, the
others what the 2-bit kernel computes from the first plane, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_moe.kernels import gpu
from flash_moe.kernels.backends import GpuKernels
from flash_moe.kernels.interface import Kernels, Shared
from flash_moe.kernels.native import Native
from flash_moe.kernels.native_backend import NativeKernels
from flash_moe.kernels.spec import (
    FULL,
    GROUP_SIZES,
    SCALE_TYPES,
    U32,
    U64,
    ExpertSpec,
    part_addresses,
)
from tests.devices import GPU
from tests.kernels import reference as ref
from tests.kernels.devices import (
    KIND,
    kernels_run,
    same_in_all_schedules,
    to_mlx,
    to_numpy,
)
from tests.kernels.gpu_cases import DTYPES, ordinary
from tests.kernels.native_cases import scale_kinds, seeds, within
from tests.kernels.planes import (
    Planes,
    first_planes,
    make_planes,
    mark_some,
    split_spec,
    unmarked,
)

COUNT = 4


@st.composite
def specs(draw: st.DrawFn) -> ExpertSpec:
    group = draw(st.sampled_from(GROUP_SIZES))
    return split_spec(
        group * draw(st.integers(1, 640 // group)),
        group * draw(st.integers(1, 384 // group)),
        group,
        draw(st.sampled_from(SCALE_TYPES)),
    )


@dataclass(frozen=True, slots=True)
class Lane:
    bank: list[ref.Bytes]

    @property
    def words(self) -> mx.array:
        return mx.array(np.concatenate(self.bank).view(np.uint32))

    def parts(self, spec: ExpertSpec) -> U64:
        raise NotImplementedError


def poisoned(planes: Planes) -> list[ref.Bytes]:
    """The same bank with every bit of the second planes set, so that their scales are NaN."""
    bank = [record.copy() for record in planes.bank]
    for record in bank:
        record[planes.spec.stride // 2 :] = 0xFF
    return bank


# -- native -------------------------------------------------------------------------------------


@given(spec=specs(), scales=scale_kinds, k=st.integers(1, 10), data=st.data(), seed=seeds)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_native(
    native: Native, spec: ExpertSpec, scales: ref.Scales, k: int, data: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    planes, tokens = make_planes(spec, COUNT, rng, scales), data.draw(st.integers(1, 12))
    slots = mark_some(rng.integers(0, COUNT, (tokens, k), np.uint32), rng)
    x = rng.normal(size=(tokens, spec.hidden)).astype(np.float32)
    bank, four = (memoryview(np.concatenate(b)) for b in (planes.bank, planes.four_bank))
    got = native.experts(spec, bank, x, slots)
    full = (slots >= FULL)[..., None]
    first = native.experts(first_planes(spec), bank, x, unmarked(slots))
    assert np.array_equal(
        got, np.where(full, native.experts(planes.four, four, x, unmarked(slots)), first)
    )
    t, j = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(0, k - 1))
    want = planes.expert(int(slots[t, j]), x[t].astype(np.float64))
    assert within(got[t, j], ref.Bounded(want.value[0], want.error[0]))
    weights = rng.normal(size=(tokens, k)).astype(np.float32)
    total = np.zeros_like(x)
    for i in range(k):
        total += weights[:, i, None] * got[:, i]
    assert np.array_equal(native.experts(spec, bank, x, slots, weights), total)
    poisoned_bank = memoryview(np.concatenate(poisoned(planes)))
    assert np.array_equal(native.experts(spec, poisoned_bank, x, unmarked(slots)), first)


def test_what_does_not_fit_is_refused(best: Native) -> None:
    spec = split_spec(64, 32, 32)
    bank = np.zeros(2 * spec.stride, np.uint8)
    x, slots = np.zeros((1, 64), np.float32), np.full((1, 1), FULL, np.uint32)
    assert best.experts(spec, memoryview(bank), x, slots).shape == (1, 1, 64)

    def refused(match: str, spec: ExpertSpec = spec, slots: U32 = slots) -> None:
        with pytest.raises(ValueError, match=match):
            best.experts(spec, memoryview(bank), x, slots)

    refused("it has one", first_planes(spec))
    refused("slot 2: there are 2", slots=slots + np.uint32(2))
    second = spec.down.second
    assert second is not None
    for part in ("weight", "scales", "biases"):
        late = replace(spec.down, second=replace(second, **{part: spec.stride - 32}))
        refused("in steps of", replace(spec, down=late))
        early = replace(spec.down, second=replace(second, **{part: -64}))
        refused("before its record", replace(spec, down=early))
    with pytest.raises(ValueError, match="some have none"):
        replace(spec, up=replace(spec.up, second=None))
    with pytest.raises(ValueError, match="not of 2 bits"):
        replace(spec, up=replace(spec.up, bits=4))


# -- GPU ----------------------------------------------------------------------------------------


@given(
    spec=specs(),
    scales=ordinary,
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([1, 2, 4]),
    columns=st.sampled_from([16, 32]),
    k=st.integers(1, 10),
    seed=seeds,
)
@settings(max_examples=3, deadline=None)
def test_gpu(
    spec: ExpertSpec,
    scales: ref.Scales,
    dtype: str,
    tile: int,
    columns: int,
    k: int,
    seed: int,
) -> None:
    rng, tuning = np.random.default_rng(seed), gpu.Tuning(2, 2, columns)
    planes = make_planes(spec, COUNT, rng, replace(scales, magnitude=1 / 64))
    x = ref.rounded(rng.normal(size=(3, spec.hidden)), dtype)
    weights = rng.random((3, k)).astype(np.float32)
    slots = mark_some(rng.integers(0, COUNT, 3 * k, np.uint32), rng)
    tokens = np.repeat(np.arange(3, dtype=np.uint32), k)
    if tile > 1:
        order = np.argsort(slots, kind="stable")
        tokens, slots = tokens[order], slots[order]

    def launch(spec: ExpertSpec, bank: list[ref.Bytes], slots: U32) -> list[mx.array]:
        rows, words = to_mlx(x, dtype), Lane(bank).words
        tiles = gpu.make_tiles(tokens, slots, tile)
        h = gpu.gate_up(KIND, spec, rows, words, tiles, tuning)
        if tile > 1:
            return [gpu.down(KIND, spec, h, words, tiles, mx.float32, tuning)]
        mixing = (mx.array(weights), Shared(), mx.float32, tuning)
        d = gpu.down(KIND, spec, h, words, tiles, mx.float32, tuning)
        return [d, gpu.down_combine(KIND, spec, h, words, tiles, *mixing)]

    got, *mixed = same_in_all_schedules(lambda: launch(spec, planes.bank, slots))
    with kernels_run():
        first, four, spared = (
            to_numpy(launch(*args)[0])
            for args in (
                (first_planes(spec), planes.bank, unmarked(slots)),
                (planes.four, planes.four_bank, unmarked(slots)),
                (spec, poisoned(planes), unmarked(slots)),
            )
        )
    # To the bit under the emulator; a GPU's compiler may fuse differently in one of the kernels.
    near = {"rtol": 1e-5, "atol": 1e-5 * np.abs(four).max()} if GPU else {"rtol": 0, "atol": 0}
    assert np.allclose(got, np.where((slots >= FULL)[:, None], four, first), **near)
    assert np.allclose(spared, first, **near)
    for y in mixed:
        total = (weights[..., None] * got.reshape(3, k, -1)).sum(1)
        assert np.allclose(y, total, rtol=1e-5, atol=1e-5 * np.abs(total).max())
    i = int(rng.integers(len(slots)))
    assert within(got[i], _row(planes, int(slots[i]), x[tokens[i]]))


def _row(planes: Planes, slot: int, x: ref.F64) -> ref.Bounded:
    one = planes.expert(slot, x)
    return ref.Bounded(one.value[0], one.error[0])


@pytest.mark.parametrize("count", [2, 40])
def test_every_backend_takes_both_kinds_of_pairs(best: Native, count: int) -> None:
    """One by one and in tiles, with full and first-plane pairs of a slot in alternation."""
    rng = np.random.default_rng(count)
    planes = make_planes(split_spec(64, 32, 32), 2, rng)
    x = rng.normal(size=(count, 64)).astype(np.float32)
    slots = mark_some(rng.integers(0, 2, (count, 2), np.uint32), rng)
    weights = np.full((count, 2), 0.5, np.float32)
    tokens, flat = np.repeat(np.arange(count, dtype=np.uint32), 2), slots.reshape(-1)
    want = [
        _row(planes, int(slot), x[t].astype(np.float64))
        for t, slot in zip(tokens, flat, strict=True)
    ]
    memory = np.concatenate(planes.bank)

    class InMemory(Lane):
        def parts(self, spec: ExpertSpec) -> U64:
            return part_addresses(spec, int(memory.ctypes.data), 2)

    backends: list[Kernels] = [NativeKernels(best), GpuKernels(KIND)]
    for kernels in backends:
        lane = InMemory(planes.bank)
        with kernels_run():
            rows = to_numpy(kernels.rows(lane, planes.spec, mx.array(x), tokens, flat))
            args = (mx.array(x), slots, mx.array(weights), Shared())
            y = to_numpy(kernels.mixture(lane, planes.spec, *args))
            for call in _calls_without_planes(
                kernels, lane, first_planes(planes.spec), args, tokens
            ):
                with pytest.raises(ValueError, match="it has one"):
                    call()
        assert all(within(row, one) for row, one in zip(rows, want, strict=True))
        assert np.allclose(y, rows.reshape(count, 2, -1).mean(1), rtol=1e-5, atol=1e-4)


def _calls_without_planes(
    kernels: Kernels,
    lane: Lane,
    spec: ExpertSpec,
    args: tuple[mx.array, U32, mx.array, Shared],
    tokens: U32,
) -> list[Callable[[], mx.array]]:
    x, slots, _, _ = args
    slots = slots | np.uint32(FULL)
    return [
        lambda: kernels.rows(lane, spec, x, tokens, slots.reshape(-1)),
        lambda: kernels.mixture(lane, spec, x, slots, *args[2:]),
    ]
