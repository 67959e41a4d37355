"""Memory for a model: idle processes that hold others give way, the longest unused first."""

from __future__ import annotations

import signal

from flash_moe.hold.loading import Loading
from flash_moe.hold.places import Holder, ends, holders
from flash_moe.machine import available_bytes

# What a process takes beside weights and working set: Python, MLX, saved prompts in use.
BESIDE_BYTES = 1 << 30
# For an idle process to end.
SECONDS = 10.0


def make_room_for(loading: Loading, key: str = "") -> None:
    """Before this is loaded, by the process whose key this is."""
    if others := _others(key):
        from flash_moe.inspection import Checkpoint

        plan = Checkpoint(loading.path).plan(loading.settings.experts)
        _make_room(plan.resident_bytes + plan.bank_bytes + BESIDE_BYTES, others)


def _make_room(nbytes: int, others: list[Holder]) -> None:
    for other in others:
        available = available_bytes()
        if available is None or available >= nbytes:
            return
        ends(other, signal.SIGUSR1, SECONDS)


def _others(key: str) -> list[Holder]:
    """Those that answer nobody now, the longest unused first."""
    idle = [other for other in holders() if other.key != key and not other.answering]
    return sorted(idle, key=lambda other: other.used)
