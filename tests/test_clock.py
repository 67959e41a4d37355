"""The clock: parts add up to the time that passed, however they lie within one another."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe import clock

# A part is a name and the parts inside it.
PARTS = st.recursive(
    st.tuples(st.sampled_from("abc"), st.just([])),
    lambda inner: st.tuples(st.sampled_from("abc"), st.lists(inner, max_size=4)),
    max_leaves=12,
)


@given(st.lists(PARTS, max_size=4))
def test_parts_add_up(parts: list[object]) -> None:
    """With a time that moves by one at every look: a part looks twice."""
    ticks, names = 0, list[str]()

    def look() -> float:
        nonlocal ticks
        ticks += 1
        return float(ticks)

    def walk(part: object) -> None:
        name, inside = part  # type: ignore[misc]
        names.append(name)
        with clock.part(name):
            for inner in inside:
                walk(inner)

    clock.take()
    real, time.perf_counter = time.perf_counter, look  # type: ignore[assignment]
    try:
        for part in parts:
            walk(part)
    finally:
        time.perf_counter = real
    spent = clock.take()
    assert spent.keys() == set(names)
    assert all(seconds >= 1 for seconds in spent.values())
    # What lies between neighbours of the same depth is time, too; at the top it is nobody's.
    assert sum(spent.values()) == ticks - len(parts)
    assert clock.take() == {}


def test_a_part_that_fails_counts_and_ends() -> None:
    clock.take()
    with pytest.raises(KeyError), clock.part("outer"), clock.part("inner"):
        raise KeyError
    with clock.part("next"):
        pass
    assert list(clock.take()) == ["inner", "outer", "next"]


def test_threads_have_clocks_of_their_own() -> None:
    clock.take()
    seen: list[dict[str, float]] = []

    def work() -> None:
        with clock.part("theirs"):
            pass
        seen.append(clock.take())

    with clock.part("ours"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert list(clock.take()) == ["ours"]
    assert list(seen[0]) == ["start", "theirs"]
    assert 0 < seen[0]["start"] <= time.process_time()
