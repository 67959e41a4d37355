"""Reuse changes nothing: a reply that continues a saved state is, to the bit, the same as one that
reads the whole prompt."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_moe.model.load import StreamedModel
from flash_moe.prefix.boundaries import chunk_ends
from tests.prefix.conversations import MARKS, contents, conversations, new_store, reply

MODELS = ["hybrid", "hybrid_mlx", "attention"]
QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> StreamedModel:
    model: StreamedModel = request.getfixturevalue(request.param)
    return model


@QUICK
@pytest.mark.parametrize("model", MODELS, indirect=True)
@given(prompts=conversations(), chunk=st.integers(1, 90))
def test_a_conversation_with_reuse_equals_one_of_fresh_prefills(
    model: StreamedModel, prompts: list[list[int]], chunk: int
) -> None:
    store, known = new_store(model), set()
    for prompt in prompts:
        fresh_store = new_store(model)
        fresh = reply(model, fresh_store, prompt, chunk)
        resumed = reply(model, store, prompt, chunk)
        cuts = chunk_ends(prompt, MARKS, chunk)
        places = {end: (tuple(prompt[:end]), cuts.ends[: n + 1]) for n, end in enumerate(cuts.ends)}
        longest = max((end for end in places if places[end] in known), default=0)
        assert (fresh.cached, resumed.cached) == (0, longest)
        assert resumed.tokens == fresh.tokens
        assert resumed.logprobs == fresh.logprobs
        # The states saved at the end are the same, so the next turn is safe, too.
        saved = dict(store.memory)
        for key, snapshot in fresh_store.memory:
            assert contents(saved[key]) == contents(snapshot)
        known.update(places[end] for end in cuts.saved)


@QUICK
@pytest.mark.parametrize("model", ["hybrid_mlx"], indirect=True)
@given(prompts=conversations(), chunk=st.integers(1, 90))
def test_cuts_do_not_change_the_reply_with_mlx_lms_arithmetic(
    model: StreamedModel, prompts: list[list[int]], chunk: int
) -> None:
    """It gives the same bits for chunks of any length, so reuse is exact in the strictest sense."""
    store = new_store(model)
    for prompt in prompts:
        assert reply(model, store, prompt, chunk).tokens == reply(model, None, prompt, 512).tokens


def test_the_second_turn_reads_only_what_is_new(hybrid: StreamedModel) -> None:
    first = [*range(10, 110), 1, 3, *range(200, 260), 4, 1, 2, 7]
    second = [*first[:-1], 300, 301, 4, 1, 3, 50, 51, 52, 4, 1, 2, 7]
    store = new_store(hybrid)
    assert reply(hybrid, store, first, 512).cached == 0
    assert reply(hybrid, store, second, 512).cached == len(first) - 3
    # Another question with the same instructions.
    other = [*first[:100], 1, 3, *range(400, 440), 4, 1, 2, 7]
    assert reply(hybrid, store, other, 512).cached == 100
    # One token of the instructions differs.
    assert reply(hybrid, store, [9, *other[1:]], 512).cached == 0


def test_a_reply_changes_no_snapshot(hybrid: StreamedModel) -> None:
    """mlx-lm writes keys and values in place; a snapshot must be out of its reach."""
    prompt = [*range(10, 90), 1, 2, 7]
    store = new_store(hybrid)
    reply(hybrid, store, prompt, 512)
    before = {key: contents(snapshot) for key, snapshot in store.memory}
    assert before
    for end in ([3, 4, 5], [6]):
        assert reply(hybrid, store, [*prompt, *end], 512).cached == 80
    after = {key: contents(snapshot) for key, snapshot in store.memory if key in before}
    assert after == before


def test_prompts_that_are_too_short_are_not_cut(hybrid: StreamedModel) -> None:
    store = new_store(hybrid)
    for prompt in ([5], [1, 2], [6, 1, 3, 8, 4, 1, 2, 7]):
        for _ in range(2):
            assert reply(hybrid, store, prompt, 512).cached == 0
    assert len(store.memory) == 0
