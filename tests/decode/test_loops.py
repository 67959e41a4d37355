"""A loop is noticed when it has gone round often enough, and nothing else is taken for one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.decode.loops import LONGEST, TIMES, TOKENS, Loops

tokens = st.integers(0, 200_000)


def noticed_at(sequence: list[int]) -> int | None:
    loops = Loops()
    return next((at for at, token in enumerate(sequence) if loops.closed_by(token)), None)


@given(st.lists(tokens, max_size=300), st.lists(tokens, min_size=1, max_size=LONGEST, unique=True))
@settings(max_examples=60, deadline=None)
def test_a_span_that_is_said_over_and_over(before: list[int], span: list[int]) -> None:
    """At the token that completes it, whatever came before."""
    before = [token for token in before if token not in span]
    needed = max(TOKENS, TIMES * len(span))
    assert noticed_at(before + span * needed) == len(before) + needed - 1


@given(st.integers(1, LONGEST), st.data())
@settings(max_examples=60, deadline=None)
def test_one_other_word_begins_anew(length: int, data: st.DataObject) -> None:
    span, needed = list(range(length)), max(TOKENS, TIMES * length)
    sequence = (span * needed)[: needed - 1]
    at = data.draw(st.integers(0, needed - 2))
    sequence[at] = 200_000
    assert noticed_at(sequence + (span * needed)[needed - 1 : needed + at]) is None


def test_a_table_is_no_loop() -> None:
    """Lines that differ in a number, and a row of zeros as long as somebody may want."""
    lines = [token for line in range(2000) for token in (1, 2, 3, 1000 + line, 4)]
    assert noticed_at(lines) is None
    assert noticed_at([7] * (TOKENS - 1)) is None
