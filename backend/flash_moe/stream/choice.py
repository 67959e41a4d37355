"""Which experts a token uses, of those that its router ranks, and with which weights. All but the
model's own choice is lossy, must be asked for, and is named wherever the model is described.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flash_moe.kernels.spec import F32, MAX_CHOSEN, U32
from flash_moe.options import Phase
from flash_moe.stream.precision import Flags, Precision


class Selection(NamedTuple):
    """For every token and rank. `full` is None where precision does not depend on the rank."""

    ids: U32
    weights: F32
    full: Flags | None


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """`k` experts a token, with the weights that they have among the `routed` likeliest, which sum
    to one where the architecture renormalises.

    In replies, an expert that is not in the page cache gives way to one that is, if that has at
    least 1 - `cache_tolerance` of its probability.
    """

    k: int
    routed: int
    renormalise: bool = False
    cache_tolerance: float = 0.0
    precision: Precision = Precision()

    @property
    def needs_host(self) -> bool:
        """Whether more than the order of the experts decides."""
        return bool(self.cache_tolerance) or self.precision.by_rank

    @property
    def ranked(self) -> int:
        """How many experts the router must rank: more than are used, where one may give way."""
        most = max(self.routed, self.k)
        return max(most, min(2 * most, MAX_CHOSEN)) if self.cache_tolerance else most

    @property
    def router_renormalises(self) -> bool:
        """Whether the router's weights are final. They stay shares of all the probability where
        candidates are compared by it."""
        return self.renormalise and not self.cache_tolerance

    def select(
        self, ids: U32, weights: F32, phase: Phase, cached: Callable[[int, bool], bool]
    ) -> Selection:
        """From the `ranked` likeliest experts of each token, in order, with the router's weights.
        `cached(expert, full)` says whether what would be read of an expert is in the page cache."""
        if self.cache_tolerance:
            if self.renormalise:
                weights = weights / weights[:, : self.routed].sum(axis=1, keepdims=True)
            if phase != "prompt":
                ids, weights = self._prefer_cached(ids, weights, phase, cached)
        full = None
        if self.precision.by_rank:
            ranks = self.precision.full_ranks(self.k, phase)
            full = np.broadcast_to(ranks, (len(ids), self.k))
        return Selection(ids[:, : self.k].copy(), weights[:, : self.k].copy(), full)

    def _prefer_cached(
        self, ids: U32, weights: F32, phase: Phase, cached: Callable[[int, bool], bool]
    ) -> tuple[U32, F32]:
        """The likeliest of the rest stands in for the least likely of the chosen, and so on
        upwards: so exchanges are between neighbours, as far as possible."""
        ids, weights = ids.copy(), weights.copy()
        full = self.precision.full_ranks(self.k, phase).tolist()
        for row, odds in zip(ids, weights, strict=True):
            other = self.k
            for at in reversed(range(self.k)):
                if cached(int(row[at]), full[at]):
                    continue
                enough = (1 - self.cache_tolerance) * odds[at]
                while other < len(row) and odds[other] >= enough:
                    if cached(int(row[other]), full[at]):
                        break
                    other += 1
                if other == len(row) or odds[other] < enough:
                    break
                row[at], odds[at] = row[other], odds[other]
                other += 1
        return ids, weights

    def lossy(self, own: int) -> list[str]:
        """What makes it other than the model's own choice of `own` experts, in words."""
        reasons = []
        if self.k != own:
            kept = ", with the weights they have among all" if self.routed > self.k else ""
            reasons.append(f"{self.k} experts of {own} a token{kept}")
        if self.cache_tolerance:
            reasons.append(
                f"cached experts in place of others up to {self.cache_tolerance:.0%} likelier"
            )
        if reason := self.precision.lossy(self.k):
            reasons.append(reason)
        return reasons
