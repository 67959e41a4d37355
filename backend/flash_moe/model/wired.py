"""On a Mac, what the GPU uses at every token stays in memory.

macOS may compress or unwire it between two layers, while we read experts: others measured a decode
loop outside of a wired limit 88 times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

# The state of a conversation and what a layer computes, beside weights and bank.
ROOM = 2 << 30


def wire(nbytes: int) -> Callable[[], Any]:
    """Raise the wired limit to so many bytes and room besides, as far as the system recommends; the
    page cache needs the rest. Call the result to put it back."""
    if not mx.metal.is_available():
        return _nothing
    most = int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    return partial(mx.set_wired_limit, mx.set_wired_limit(min(nbytes + ROOM, most)))


def _nothing() -> None:
    pass
