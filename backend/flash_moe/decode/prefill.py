"""How a prompt is read: where its chunks end, and what of it a state holds already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Prefill:
    """The prompt up to `cached` is in `cache`; chunks end at `ends`, ascending, all of them before
    the prompt's end. What follows the last comes with the first logits.

    `reached` is told after every chunk, and `finish` once when the reply is over: it returns a
    warning for the user, or nothing.
    """

    ends: Sequence[int]
    cache: list[Any]
    cached: int = 0
    reached: Callable[[int, list[Any]], None] = lambda position, cache: None
    finish: Callable[[], str] = lambda: ""


# From the prompt and the largest chunk.
Begin = Callable[[Sequence[int], int], Prefill]


def whole_chunks(total: int, chunk: int) -> list[int]:
    """All of the prompt but its last token, whose logits are the first wanted."""
    return [min(start + chunk, total - 1) for start in range(0, total - 1, chunk)]
