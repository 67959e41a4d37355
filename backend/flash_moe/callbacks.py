"""What callers hand in to hear how far a piece of work is, or to stop it."""

from __future__ import annotations

from collections.abc import Callable

# Done so far, and in all.
Progress = Callable[[int, int], None]
# So much more is done.
Advance = Callable[[int], None]
Cancelled = Callable[[], bool]
# What is about to take seconds, for a person.
Notice = Callable[[str], None]


def no_progress(done: int, total: int) -> None:
    pass


def no_advance(amount: int) -> None:
    pass


def no_notice(text: str) -> None:
    pass


def never() -> bool:
    return False
