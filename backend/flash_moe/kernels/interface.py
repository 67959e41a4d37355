"""What all kernels offer, and what they are given: rows of experts, whole mixtures, routing.

`rows` and `mixture` read the weights where the bank has them, so their result must be fenced like
any other that is computed from it. spec.py says what a pair and its slot number are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from flash_moe.kernels.spec import U32, U64, ExpertSpec


@dataclass(frozen=True, slots=True)
class Shared:
    """The shared expert, which is added to a mixture as sigmoid(gate) * output. All [tokens, …];
    both None where a model has none."""

    output: mx.array | None = None
    gate: mx.array | None = None


class Memory(Protocol):
    """A lane of the bank, as a kernel sees it: its memory, or for each slot where the parts of its
    expert are, which need not be in the lane."""

    @property
    def words(self) -> mx.array: ...

    def parts(self, spec: ExpertSpec) -> U64: ...


class Kernels(Protocol):
    @property
    def one_hand_over(self) -> bool:
        """Whether the shared expert is handed over together with the router: 0.2 ms a layer less on
        CUDA. Elsewhere reading would wait for it."""

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        """Whether MLX's own operations are the better choice for so many tokens an expert."""

    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        """expert_{slots[i]}(x[tokens[i]]) for every pair i, [pairs, hidden]."""

    def mixture(
        self,
        lane: Memory,
        spec: ExpertSpec,
        x: mx.array,
        slots: U32,
        weights: mx.array,
        shared: Shared,
    ) -> mx.array:
        """sum over k of weights[t, k] * expert_{slots[t, k]}(x[t]), plus shared, [t, hidden]."""

    def combine(
        self, rows: mx.array, place: U32, weights: mx.array, shared: Shared, dtype: mx.Dtype
    ) -> mx.array:
        """The same from rows that are computed already: that of (t, k) is at place[t * K + k]."""

    def route(
        self, logits: mx.array, k: int, renormalise: bool, keep: int
    ) -> tuple[mx.array, mx.array]:
        """The first `keep` of the k likeliest experts of each row of logits, and their weights: if
        renormalised, those of all k sum to one."""
