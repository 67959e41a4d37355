"""How a prompt is read: where its chunks end, and how much of it a state holds already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def _ignore(position: int, cache: list[Any]) -> None:
    pass


def _no_warning() -> str:
    return ""


@dataclass(slots=True)
class Prefill:
    """The first `cached` tokens of the prompt are in `cache`; chunks end at `ends`, ascending, all
    of them before the prompt's end. What follows the last is computed with the first logits.

    `reached` hears of every chunk, and `finish` once of the end of the reply: it returns a
    warning for the user, or nothing.
    """

    ends: Sequence[int]
    cache: list[Any]
    cached: int = 0
    reached: Callable[[int, list[Any]], None] = _ignore
    finish: Callable[[], str] = _no_warning

    @property
    def computed(self) -> int:
        """Tokens in the cache after the last chunk."""
        return self.ends[-1] if self.ends else self.cached


# From the prompt and the largest chunk.
Begin = Callable[[Sequence[int], int], Prefill]


def from_cache(cache: list[Any]) -> Begin:
    """Read all of a prompt into a state, in full chunks."""
    return lambda prompt, chunk: Prefill(full_chunks(len(prompt), chunk), cache)


def full_chunks(total: int, chunk: int) -> list[int]:
    """All of the prompt but its last token, whose logits are the first wanted."""
    return [min(start + chunk, total - 1) for start in range(0, total - 1, chunk)]
