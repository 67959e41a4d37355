"""On a Mac, what the GPU uses at every token stays in memory.

macOS may compress or unwire it between two layers, while we read experts: others measured a decode
loop outside of a wired limit 88 times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import mlx.core as mx

# The state of a conversation and what a layer computes, beside weights and bank.
ROOM = 2 << 30

# Of the models that are loaded; and the limit before the first of them.
_wired: list[int] = []
_before: list[int] = []


def wire(nbytes: int) -> Callable[[], None]:
    """Raise the wired limit by so many bytes, as far as the system recommends; the page cache needs
    the rest. Call the result to take that back."""
    if not mx.metal.is_available():
        return lambda: None
    _wired.append(nbytes)
    _set_limit()

    def unwire() -> None:
        with suppress(ValueError):
            _wired.remove(nbytes)
            _set_limit()

    return unwire


def _set_limit() -> None:
    if _wired:
        most = int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
        before = mx.set_wired_limit(min(sum(_wired) + ROOM, most))
        if not _before:
            _before.append(before)
    elif _before:
        mx.set_wired_limit(_before.pop())
