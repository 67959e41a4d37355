"""The GPU kernels against a float64 reference made from the bits, whatever the machine has.

A Mac runs this file on Metal, a machine with an NVIDIA GPU on CUDA, any other under the emulator:
the same shaders, the same Python call path. Bounds are derived in reference.py; they cover the
worst that rounding can do, which sums of random signs are far from. So each output is also held to
`TYPICAL` of its bound, plus one unit in its own last place.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from hypothesis import event, given, settings
from hypothesis import strategies as st

from flash_moe.kernels import gpu
from flash_moe.kernels.interface import Shared
from flash_moe.kernels.spec import FULL, U32
from tests.kernels import reference as ref
from tests.kernels.devices import EXAMPLES, F64, KIND, same_in_all_schedules, to_mlx
from tests.kernels.gpu_cases import DTYPES, Case, Data, cases
from tests.kernels.native_cases import seeds

TYPICAL = 0.05

check = settings(max_examples=EXAMPLES, deadline=None)


def assert_within(got: F64, expected: ref.Bounded, dtype: str, scale: float = 1.0) -> None:
    assert np.isfinite(got).all()
    error = np.abs(got - expected.value)
    worst = (error / expected.rounded_to(dtype)).max()
    assert worst <= 1, f"off by {worst:.2f} of what rounding can do"
    ulp = 2 * ref.UNIT[dtype] * np.abs(expected.value) + ref.SMALLEST[dtype]
    typical = ulp + TYPICAL * expected.error * scale + ref.FLUSH
    worst = (error / typical).max()
    assert worst <= 1, f"off by {worst:.2f} of what rounding does"


def hidden_rows(data: Data, tokens: U32, slots: U32) -> ref.Bounded:
    rows = [
        ref.hidden_state(data.bank[slot], data.case.spec, data.x[token : token + 1])
        for token, slot in zip(tokens, slots, strict=True)
    ]
    return ref.Bounded(*(np.concatenate([getattr(r, n) for r in rows]) for n in ("value", "error")))


def from_rows(parts: list[ref.Bounded], weights: npt.NDArray[np.float32]) -> ref.Bounded:
    """The weighted sum of rows [1, hidden] that are in the pairs' order."""
    t, k = weights.shape
    wide = weights.astype(np.float64)[..., None]
    value, error = (
        np.stack([getattr(part, name)[0] for part in parts]).reshape(t, k, -1)
        for name in ("value", "error")
    )
    more = ref.gamma(k + 3) * np.abs(value)
    return ref.Bounded((wide * value).sum(1), (wide * (error + more)).sum(1))


@check
@given(case=cases())
def test_one_token_at_a_time(case: Case) -> None:
    """gate_up and down_combine, the two launches of decoding."""
    data = case.make()
    tokens, slots = data.pairs()
    weights = data.rng.random((case.tokens, case.k)).astype(np.float32)
    tiles = gpu.make_tiles(tokens, slots)

    def launch() -> list[mx.array]:
        x, bank = to_mlx(data.x, case.dtype), data.words
        h = gpu.gate_up(KIND, case.spec, x, bank, tiles, case.tuning)
        y = gpu.down_combine(
            *(KIND, case.spec, h, bank, tiles, mx.array(weights)),
            *(Shared(), x.dtype, case.tuning),
        )
        return [h, y]

    h, y = same_in_all_schedules(launch)
    assert_within(h, hidden_rows(data, tokens, slots), "float32")
    expected = ref.mixture(data.bank, case.spec, data.x, data.slots, weights.astype(np.float64))
    assert_within(y, expected, case.dtype)
    # From the kernel's own h, whose error would otherwise hide that of the last step.
    parts = [
        ref.product(data.bank[slot], case.spec.down, ref.Bounded(row, np.zeros_like(row)))
        for slot, row in zip(slots, h[:, None], strict=True)
    ]
    assert_within(y, from_rows(parts, weights), case.dtype)
    event(f"{case.spec.gate.bits} bits, {case.dtype}")


@check
@given(case=cases(), tile=st.sampled_from([2, 4, 8]))
def test_tokens_that_share_an_expert(case: Case, tile: int) -> None:
    """gate_up, down and combine, the three of prefill."""
    data = case.make()
    tokens, slots, place = data.sorted_pairs()
    weights = data.rng.random((case.tokens, case.k)).astype(np.float32)
    tiles = gpu.make_tiles(tokens, slots, tile)

    def launch() -> list[mx.array]:
        x, bank = to_mlx(data.x, case.dtype), data.words
        h = gpu.gate_up(KIND, case.spec, x, bank, tiles, case.tuning)
        d = gpu.down(KIND, case.spec, h, bank, tiles, mx.float32, case.tuning)
        y = gpu.combine(KIND, d, place, mx.array(weights), Shared(), x.dtype)
        return [h, d, y]

    h, d, y = same_in_all_schedules(launch)
    assert_within(h, hidden_rows(data, tokens, slots), "float32")
    for row, (token, slot) in enumerate(zip(tokens, slots, strict=True)):
        one = ref.expert(data.bank[slot], case.spec, data.x[token : token + 1])
        assert_within(d[row : row + 1], one, "float32")
    # From the kernel's own d: a sum of k products, within one unit of the last place.
    exact = [ref.Bounded(row, np.zeros_like(row)) for row in d[place][:, None]]
    assert_within(y, from_rows(exact, weights), case.dtype, scale=1 / TYPICAL)


@check
@given(
    tokens=st.integers(1, 3),
    k=st.integers(1, 10),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_the_shared_expert_is_added_to_a_mixture(
    tokens: int, k: int, dtype: str, seed: int
) -> None:
    """After down and after combine alike."""
    case = Case(ref.make_spec(96, 64, 4, 32), dtype, tokens, k, ref.Scales(), gpu.Tuning(), seed)
    data = case.make()
    weights = data.rng.random((tokens, k)).astype(np.float32)
    shared_parts = [ref.rounded(data.rng.normal(size=(tokens, n)), dtype) for n in (96, 1)]
    h = data.rng.normal(size=(tokens * k, 64)).astype(np.float32)
    flat, slots = data.pairs()
    tiles = gpu.make_tiles(flat, slots)
    place = np.arange(tokens * k, dtype=np.uint32)

    def launch() -> list[mx.array]:
        shared = Shared(*(to_mlx(value, dtype) for value in shared_parts))
        args = (mx.array(weights), shared, getattr(mx, dtype))
        d = gpu.down(KIND, case.spec, mx.array(h), data.words, tiles, mx.float32, case.tuning)
        fused = gpu.down_combine(
            KIND, case.spec, mx.array(h), data.words, tiles, *args, case.tuning
        )
        return [fused, gpu.combine(KIND, d, place, *args)]

    parts = [
        ref.product(data.bank[slot], case.spec.down, ref.Bounded(row, np.zeros_like(row)))
        for slot, row in zip(slots, h[:, None].astype(np.float64), strict=True)
    ]
    mixed = from_rows(parts, weights)
    total, bound = mixed.value, mixed.error + ref.gamma(8) * np.abs(mixed.value)
    output, gate = shared_parts
    total = total + output / (1 + np.exp(-gate))
    bound = bound + np.abs(output) * ref.gamma(k + 16)
    for got in same_in_all_schedules(launch):
        # The largest of the parts decides how much of a bound is typical here: use all of it.
        assert_within(got, ref.Bounded(total, bound), dtype, scale=1 / TYPICAL)


@check
@given(
    tokens=st.integers(1, 3),
    experts=st.integers(1, 1024),
    k=st.integers(1, 10),
    fewer=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    renormalise=st.booleans(),
    ties=st.booleans(),
    seed=seeds,
)
def test_router(
    tokens: int,
    experts: int,
    k: int,
    fewer: int,
    dtype: str,
    renormalise: bool,
    ties: bool,
    seed: int,
) -> None:
    """Of k experts the first ones, with the weights that they have among all k."""
    rng, k = np.random.default_rng(seed), min(k, experts)
    keep = max(1, k - fewer)
    logits = ref.rounded(4 * rng.normal(size=(tokens, experts)), dtype)
    if ties:
        logits = np.round(logits)

    def launch() -> list[mx.array]:
        return list(gpu.router(KIND, to_mlx(logits, dtype), k, renormalise, keep))

    ids, weights = same_in_all_schedules(launch)
    expected, shares = (full[:, :keep] for full in ref.router(logits, k, renormalise))
    assert (ids == expected).all()
    # exp of a rounded argument up to 64, a sum of `experts` of them, two divisions.
    relative = (64 + 8) * ref.UNIT["float32"] + ref.gamma(40)
    assert (np.abs(weights - shares) <= 2 * relative * shares + ref.FLUSH).all()


def test_router_ids_are_in_range_for_any_logits() -> None:
    """Experts that a model masks with -inf, and a model that is broken."""
    masked = np.full((2, 70), -np.inf)
    masked[0, [3, 40]] = [1.0, 2.0]
    masked[1, :] = np.nan

    def launch() -> list[mx.array]:
        return list(gpu.router(KIND, to_mlx(masked, "float32"), 4, False))

    ids, weights = same_in_all_schedules(launch)
    assert ids[0].tolist() == [40, 3, 0, 1]
    assert sorted(set(ids[1].tolist())) == sorted(ids[1].tolist())
    assert (ids < 70).all()
    assert np.isnan(weights[1]).all()


@settings(max_examples=200, deadline=None)
@given(
    # Pairs of one slot and another choice of planes must not share a tile.
    slots=st.lists(st.sampled_from([0, 1, 2, FULL, FULL + 1]), min_size=1, max_size=40),
    tile=st.integers(1, 8),
    seed=seeds,
)
def test_tiles_cover_every_pair_once(slots: list[int], tile: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 9, len(slots)).astype(np.uint32)
    tiles = gpu.make_tiles(tokens, np.array(sorted(slots), np.uint32), tile)
    table, covered = np.array(tiles.table), []
    assert (tiles.count, tiles.pairs, tiles.tokens) == (len(table), len(slots), tile)
    for slot, first, count, *named in table.tolist():
        assert 1 <= count <= tile
        for i in range(count):
            covered.append(first + i)
            assert sorted(slots)[first + i] == slot
            assert tokens[first + i] == named[i]
    assert covered == list(range(len(slots)))
    # No more of them than needed.
    assert len(table) == sum(-(-slots.count(slot) // tile) for slot in set(slots))
