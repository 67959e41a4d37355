"""Memory holds the snapshots that were used last, and never more bytes than its limit."""

from __future__ import annotations

import mlx.core as mx
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flash_moe.prefix.memory import MemorySnapshots
from flash_moe.prefix.state import Snapshot

LIMIT = 1000
names = st.sampled_from("abcdefgh")


def snapshot(nbytes: int) -> Snapshot:
    return Snapshot((), (), [], [mx.zeros(nbytes, mx.uint8)])


class LeastRecentlyUsed(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = MemorySnapshots(LIMIT)
        # The least recently used first.
        self.model: dict[str, Snapshot] = {}

    @rule(name=names, nbytes=st.integers(0, LIMIT + 200))
    def put(self, name: str, nbytes: int) -> None:
        new = snapshot(nbytes)
        self.memory.put(name, new)
        self.model.pop(name, None)
        if nbytes > LIMIT:
            return
        while sum(old.nbytes for old in self.model.values()) + nbytes > LIMIT:
            del self.model[next(iter(self.model))]
        self.model[name] = new

    @rule(name=names)
    def get(self, name: str) -> None:
        assert self.memory.get(name) is self.model.get(name)
        if name in self.model:
            self.model[name] = self.model.pop(name)

    @rule(name=names)
    def remove(self, name: str) -> None:
        self.memory.remove(name)
        self.model.pop(name, None)

    @rule()
    def clear(self) -> None:
        self.memory.clear()
        self.model.clear()

    @invariant()
    def bounded(self) -> None:
        assert self.memory.nbytes == sum(old.nbytes for old in self.model.values()) <= LIMIT
        assert len(self.memory) == len(self.model)

    @invariant()
    def in_order(self) -> None:
        assert [key for key, _ in self.memory] == list(self.model)


TestLeastRecentlyUsed = LeastRecentlyUsed.TestCase
