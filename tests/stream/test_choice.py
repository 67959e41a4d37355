"""The experts that a token uses: against the sentences that define them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.kernels.spec import MAX_CHOSEN
from flash_moe.options import Phase
from flash_moe.stream.choice import ExpertChoice, Selection
from flash_moe.stream.precision import Precision

EXPERTS = 24
TOKENS = 3

Routing = tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """The experts of each token by falling probability, and the probabilities."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    odds = rng.dirichlet(np.full(EXPERTS, draw(st.sampled_from([0.3, 3.0]))), TOKENS)
    ids = np.argsort(-odds, axis=1).astype(np.uint32)
    return ids, np.take_along_axis(odds, ids.astype(np.int64), 1).astype(np.float32)


def ranked(choice: ExpertChoice, routing: Routing) -> Routing:
    """As the router gives them: the first `ranked`, with the weights that the choice asks for."""
    ids, odds = (part[:, : choice.ranked] for part in routing)
    if choice.router_renormalises:
        odds = odds / odds[:, : choice.routed].sum(axis=1, keepdims=True)
    return ids, odds


def select(
    choice: ExpertChoice,
    routing: Routing,
    phase: Phase = "reply",
    cached: frozenset[int] = frozenset(),
) -> Selection:
    return choice.select(*ranked(choice, routing), phase, lambda expert, full: expert in cached)


sets = st.frozensets(st.integers(0, EXPERTS - 1))
counts = st.tuples(st.integers(1, 8), st.integers(0, 4))


@given(routings(), counts, st.booleans())
def test_fewer_experts_keep_the_weights_that_they_have_among_all(
    routing: Routing, count: tuple[int, int], renormalise: bool
) -> None:
    k, more = count
    everything = select(ExpertChoice(k + more, k + more, renormalise), routing)
    fewer = select(ExpertChoice(k, k + more, renormalise), routing)
    assert (fewer.ids == everything.ids[:, :k]).all()
    assert (fewer.weights == everything.weights[:, :k]).all()
    assert fewer.full is None


@given(routings(), counts, st.floats(0.01, 0.99), st.booleans(), sets)
def test_cached_experts_are_preferred_within_bounds(
    routing: Routing, count: tuple[int, int], share: float, norm: bool, cached: frozenset[int]
) -> None:
    k, more = count
    choice = ExpertChoice(k, k + more, norm, cache_tolerance=share)
    ids, odds = routing
    before = select(choice, routing, "prompt", cached)
    after = select(choice, routing, "reply", cached)
    assert (before.ids == ids[:, :k]).all()
    total = odds[:, : choice.routed].sum(axis=1, keepdims=True) if norm else 1
    np.testing.assert_allclose(before.weights, odds[:, :k] / total, rtol=1e-6)
    for token in range(TOKENS):
        assert len(set(after.ids[token].tolist())) == k
        for at in range(k):
            own, other = before.ids[token, at], after.ids[token, at]
            if own == other:
                continue
            assert other in cached
            assert own not in cached
            assert other not in before.ids[token]
            least = (1 - share) * before.weights[token, at]
            assert least * (1 - 1e-6) <= after.weights[token, at] <= before.weights[token, at]


@given(routings(), st.integers(1, 8), st.floats(0.01, 0.99), sets)
def test_nothing_more_could_be_taken_from_the_cache(
    routing: Routing, k: int, share: float, cached: frozenset[int]
) -> None:
    choice = ExpertChoice(k, k, True, cache_tolerance=share)
    after = select(choice, routing, cached=cached)
    ids, odds = (part[:, : choice.ranked] for part in routing)
    for token in range(TOKENS):
        missing = [i for i in range(k) if after.ids[token, i] not in cached]
        spare = [
            odds[token, j]
            for j in range(k, choice.ranked)
            if ids[token, j] in cached and ids[token, j] not in after.ids[token]
        ]
        if missing and spare:
            # The best spare expert is out of reach of the least likely one that is not cached.
            assert max(spare) < (1 - share) * odds[token, missing[-1]] * (1 + 1e-6)


@given(routings(), st.integers(1, 8), st.integers(0, 9))
def test_the_weightiest_experts_are_computed_in_full(
    routing: Routing, k: int, full_experts: int
) -> None:
    choice = ExpertChoice(k, k, True, precision=Precision(full_experts, ("prompt",)))
    reply, prompt = (select(choice, routing, phase) for phase in ("reply", "prompt"))
    ranks = np.broadcast_to(np.arange(k) < full_experts, (TOKENS, k))
    assert reply.full is not None
    assert prompt.full is not None
    assert (reply.full == ranks).all()
    assert prompt.full.all()
    assert (reply.ids == prompt.ids).all()
    assert select(ExpertChoice(k, k, True), routing).full is None


@given(routings(), st.integers(1, 8), st.integers(0, 9), st.floats(0.01, 0.99), sets)
def test_the_cache_is_asked_for_the_planes_that_would_be_read(
    routing: Routing, k: int, full_experts: int, share: float, cached: frozenset[int]
) -> None:
    """With all first planes cached, only an expert that is read in full can be missing."""
    choice = ExpertChoice(k, k, True, cache_tolerance=share, precision=Precision(full_experts))
    ids, odds = ranked(choice, routing)
    own = ids[:, :k].copy()
    after = choice.select(ids, odds, "reply", lambda expert, full: not full or expert in cached)
    assert (after.ids == own)[:, full_experts:].all()


@given(counts, st.booleans(), st.floats(0, 0.9))
def test_the_router_ranks_as_many_experts_as_the_choice_compares(
    count: tuple[int, int], renormalise: bool, share: float
) -> None:
    k, more = count
    choice = ExpertChoice(k, k + more, renormalise, share)
    assert k <= choice.ranked
    assert choice.routed <= choice.ranked <= MAX_CHOSEN
    assert (choice.ranked > choice.routed) == (share > 0)
    assert choice.needs_host == (share > 0)


def test_every_lossy_choice_is_described() -> None:
    assert ExpertChoice(10, 10, True).lossy(10) == []
    assert ExpertChoice(10, 10, True, precision=Precision(10)).lossy(10) == []
    choice = ExpertChoice(4, 10, True, 0.1, Precision(2, ("prompt", "grammar")))
    assert choice.lossy(10) == [
        "4 experts of 10 a token, with the weights they have among all",
        "cached experts in place of others up to 10% likelier",
        "2 experts of 4 at 4 bits, the others at 2, all of them in prompt and grammar",
    ]
    assert ExpertChoice(4, 4).lossy(10) == ["4 experts of 10 a token"]
    assert not ExpertChoice(4, 10, True).needs_host
    assert choice.needs_host
