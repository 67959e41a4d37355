"""A key stands for these tokens, cut in these places, of this model."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flash_moe.prefix.lookup import state_keys

prompts = st.lists(st.integers(0, 3), min_size=1, max_size=12)
# Small ids and short prompts, so that equal ones with different cuts are common.
questions = st.tuples(prompts, st.sets(st.integers(1, 12)), st.sampled_from(["a", "b"]))


@given(questions, questions)
def test_keys_are_equal_if_and_only_if_tokens_cuts_and_model_are(
    one: tuple[list[int], set[int], str], other: tuple[list[int], set[int], str]
) -> None:
    keys: dict[tuple[object, ...], set[str]] = {}
    for ids, cuts, scope in (one, other):
        ends = sorted(end for end in cuts if end <= len(ids))
        for number, (end, key) in enumerate(state_keys(ids, ends, scope).items(), 1):
            keys.setdefault((tuple(ids[:end]), tuple(ends[:number]), scope), set()).add(key)
    assert all(len(same) == 1 for same in keys.values())
    every = sorted(key for same in keys.values() for key in same)
    assert all(a != b for a, b in pairwise(every))
