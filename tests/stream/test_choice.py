"""Which experts a token uses: against the words that say it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.errors import OptionError
from flash_moe.stream.choice import Choice, Occasion

EXPERTS = 24
TOKENS = 3


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of all experts by token, the likeliest first, and whose they are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    odds = rng.dirichlet(np.full(EXPERTS, draw(st.sampled_from([0.3, 3.0]))), TOKENS)
    ids = np.argsort(-odds, axis=1).astype(np.uint32)
    return ids, np.take_along_axis(odds, ids.astype(np.int64), 1).astype(np.float32)


def settle(
    choice: Choice,
    routing: tuple[np.ndarray, np.ndarray],
    occasion: Occasion = "reply",
    cached: frozenset[int] = frozenset(),
) -> Any:
    ids, odds = (part[:, : choice.ranked] for part in routing)
    if choice.renormalise and not choice.prefer_cached:
        odds = odds / odds[:, : choice.routed].sum(axis=1, keepdims=True)
    return choice.settle(ids, odds, occasion, lambda expert, whole: expert in cached)


sets = st.frozensets(st.integers(0, EXPERTS - 1))
counts = st.tuples(st.integers(1, 8), st.integers(0, 4))


@given(routings(), counts, st.floats(0, 0.99), st.booleans())
def test_light_experts_are_left_out(
    routing: tuple[np.ndarray, np.ndarray], count: tuple[int, int], least: float, norm: bool
) -> None:
    k, more = count
    plain, skipping = (Choice(k, k + more, norm, skip_below=x) for x in (0.0, least))
    all_of_them, left = settle(plain, routing), settle(skipping, routing)
    stays = (all_of_them.weights >= np.float32(least)) | (np.arange(k) == 0)
    assert (left.ids[stays] == all_of_them.ids[stays]).all()
    assert (left.weights == np.where(stays, all_of_them.weights, 0)).all()
    # Nothing else is read: what was left out names an expert that is there.
    assert (left.ids == np.where(stays, left.ids, left.ids[:, :1])).all()


@given(routings(), counts, st.floats(0.01, 0.99), st.booleans(), sets)
def test_what_is_cached_is_preferred_within_bounds(
    routing: tuple[np.ndarray, np.ndarray],
    count: tuple[int, int],
    share: float,
    norm: bool,
    cached: frozenset[int],
) -> None:
    k, more = count
    choice = Choice(k, k + more, norm, prefer_cached=share)
    ids, odds = routing
    before, after = (
        settle(choice, routing, "prompt", cached),
        settle(choice, routing, cached=cached),
    )
    assert (before.ids == ids[:, :k]).all()
    total = odds[:, : choice.routed].sum(axis=1, keepdims=True) if norm else 1
    np.testing.assert_allclose(before.weights, odds[:, :k] / total, rtol=1e-6)
    for token in range(TOKENS):
        assert len(set(after.ids[token].tolist())) == k
        for at in range(k):
            own, taken = before.ids[token, at], after.ids[token, at]
            if own == taken:
                continue
            assert taken in cached
            assert own not in cached
            assert taken not in before.ids[token]
            least = (1 - share) * before.weights[token, at]
            assert least * (1 - 1e-6) <= after.weights[token, at] <= before.weights[token, at]


@given(routings(), st.integers(1, 8), st.floats(0.01, 0.99), sets)
def test_nothing_more_could_be_taken_from_the_cache(
    routing: tuple[np.ndarray, np.ndarray], k: int, share: float, cached: frozenset[int]
) -> None:
    choice = Choice(k, k, True, prefer_cached=share)
    after = settle(choice, routing, cached=cached)
    ids, odds = (part[:, : choice.ranked] for part in routing)
    for token in range(TOKENS):
        missing = [i for i in range(k) if after.ids[token, i] not in cached]
        spare = [
            odds[token, j]
            for j in range(k, choice.ranked)
            if ids[token, j] in cached and ids[token, j] not in after.ids[token]
        ]
        if missing and spare:
            # The least likely that is not cached is out of reach of the best that is left.
            assert max(spare) < (1 - share) * odds[token, missing[-1]] * (1 + 1e-6)


@given(routings(), st.integers(1, 8), st.integers(0, 9), st.floats(0, 0.5))
def test_the_weightiest_have_all_bits(
    routing: tuple[np.ndarray, np.ndarray], k: int, whole: int, least: float
) -> None:
    choice = Choice(k, k, True, whole=whole, whole_in=("prompt",), skip_below=least)
    reply, prompt = (settle(choice, routing, occasion) for occasion in ("reply", "prompt"))
    read = reply.weights > 0
    assert (reply.whole == (read & (np.arange(k) < whole))).all()
    assert (prompt.whole == read).all()
    assert settle(Choice(k, k, True), routing).whole is None


@given(routings(), st.integers(1, 8), st.integers(0, 9), st.floats(0.01, 0.99), sets)
def test_the_cache_is_asked_for_what_would_be_read(
    routing: tuple[np.ndarray, np.ndarray],
    k: int,
    whole: int,
    share: float,
    cached: frozenset[int],
) -> None:
    """With all first planes there, only what is wanted whole can be missing."""
    choice = Choice(k, k, True, prefer_cached=share, whole=whole)
    ids, odds = (part[:, : choice.ranked] for part in routing)
    own = ids[:, :k].copy()
    after = choice.settle(ids, odds, "reply", lambda expert, both: not both or expert in cached)
    assert (after.ids == own)[:, whole:].all()


def test_what_is_lossy_is_said() -> None:
    assert Choice(10, 10, True).lossy(10) == []
    assert Choice(10, 10, True, whole=10).lossy(10) == []
    choice = Choice(4, 10, True, 0.05, 0.1, 2, ("prompt", "grammar"))
    assert choice.lossy(10) == [
        "4 experts of 10 a token, with the weights they have among all",
        "experts of a weight below 0.05 skipped",
        "cached experts instead of others up to 10% likelier",
        "2 experts of 4 with all bits, the rest with 2, all in prompt and grammar",
    ]
    assert not Choice(4, 10, True).needs_host
    assert choice.needs_host


@pytest.mark.parametrize(
    "wrong",
    [{"skip_below": 1.0}, {"prefer_cached": -0.1}, {"whole": -1}, {"whole_in": ("songs",)}],
)
def test_what_cannot_be_asked_for(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}="):
        Choice(4, 4, True, **wrong)
