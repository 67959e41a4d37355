"""Where the time before the first word goes. Every thread has a clock of its own, and its parts
add up: what one part spends within another counts once, for the inner one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class _Clock(threading.local):
    def __init__(self) -> None:
        # Made at a thread's first part. Processor time: a chat may have waited for its user.
        self.spent = {"start": time.process_time()}
        self.within = 0.0


_clock = _Clock()


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is spent inside counts for this part. No generator may be left in the middle of one."""
    outer, _clock.within = _clock.within, 0.0
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - begin
        spent = _clock.spent
        spent[name] = spent.get(name, 0.0) + seconds - _clock.within
        _clock.within = outer + seconds


def take() -> dict[str, float]:
    """The seconds of every part of this thread since the last call, in the order of their ends;
    the first call also has `start`, the processor time of the process before its first part."""
    spent, _clock.spent = _clock.spent, {}
    return spent
