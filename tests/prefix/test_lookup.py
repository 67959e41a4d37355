"""A key says: these tokens, cut here, of this model."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flash_moe.prefix.lookup import keys

prompts = st.lists(st.integers(0, 3), min_size=1, max_size=12)
# Small ids and short prompts, so that equal ones with different cuts are common.
questions = st.tuples(prompts, st.sets(st.integers(1, 12)), st.sampled_from(["a", "b"]))


@given(questions, questions)
def test_keys_are_equal_if_and_only_if_all_of_that_is(
    one: tuple[list[int], set[int], str], other: tuple[list[int], set[int], str]
) -> None:
    said = {}
    for ids, cuts, scope in (one, other):
        ends = sorted(end for end in cuts if end <= len(ids))
        for number, (end, key) in enumerate(keys(ids, ends, scope).items(), 1):
            said.setdefault((tuple(ids[:end]), tuple(ends[:number]), scope), set()).add(key)
    assert all(len(found) == 1 for found in said.values())
    every = sorted(key for found in said.values() for key in found)
    assert all(a != b for a, b in pairwise(every))
