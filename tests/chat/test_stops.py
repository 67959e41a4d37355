"""Stop strings: the pieces that a text comes in do not change the text that is shown."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flash_moe.chat.stops import StopScanner

# Two letters and short strings: stops that overlap, contain and repeat each other are common.
words = st.text(alphabet="ab", max_size=4)
texts = st.text(alphabet="abc", max_size=24)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first stop to be complete ends the text, the longest of several."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@settings(max_examples=400, deadline=None)
@given(texts, st.lists(words, max_size=4), st.lists(st.integers(0, 24), max_size=8))
@example("abcd", ["bc", "abcd"], [])
@example("abcd", ["bc", "abcd"], [3])
def test_any_cut_gives_what_the_whole_text_gives(
    text: str, stops: list[str], places: list[int]
) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.feed(piece) for piece in cut(text, places)) + scanner.finish()
    assert (shown, scanner.stopped) == reference(text, stops)


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(words, min_size=1, max_size=3))
def test_text_is_held_back_only_while_it_may_begin_a_stop(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for at, letter in enumerate(text, 1):
        shown += scanner.feed(letter)
        waiting = text[len(shown) : at]
        if scanner.stopped:
            break
        assert waiting == "" or any(stop.startswith(waiting) for stop in stops)


@settings(max_examples=100, deadline=None)
@given(texts, words.filter(bool), texts)
def test_nothing_comes_after_a_stop(before: str, stop: str, after: str) -> None:
    scanner = StopScanner([stop])
    scanner.feed(before + stop)
    assert scanner.stopped
    assert (scanner.feed(after), scanner.finish()) == ("", "")


@pytest.mark.parametrize("stops", [[], [""], ["", ""]])
def test_without_a_stop_text_passes_at_once(stops: list[str]) -> None:
    scanner = StopScanner(stops)
    assert scanner.feed("abc") == "abc"
    assert scanner.finish() == ""
    assert not scanner.stopped
