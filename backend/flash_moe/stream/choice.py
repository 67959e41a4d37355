"""Which experts a token uses, of those that its router ranks, and how. All but the model's own
choice is lossy, is asked for, and is named wherever the model is described.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from flash_moe.errors import OptionError
from flash_moe.kernels.gpu import MAX_CHOSEN, U32

F32 = npt.NDArray[np.float32]
# Whether both planes are wanted, for every token and rank; None is what the streamer says.
Whole = npt.NDArray[np.bool_] | None

# What is being computed: a prompt, a reply, or a part of one that is held to a grammar.
Occasion = Literal["prompt", "reply", "grammar"]


class Chosen(NamedTuple):
    """For every token and rank."""

    ids: U32
    weights: F32
    whole: Whole


@dataclass(frozen=True, slots=True)
class Choice:
    """`k` experts a token, with the weights that they have among the `routed` best (renormalised
    over those where the architecture does so).

    An expert other than a token's first is left out if its weight is less than `skip_below`. In
    replies, an expert that is not in the page cache gives way to one that is, if that has at least
    1 - `prefer_cached` of its probability. Of a pack in two planes the first `whole` ranks are
    computed with all bits, and in `whole_in` all ranks.
    """

    k: int
    routed: int
    renormalise: bool
    skip_below: float = 0.0
    prefer_cached: float = 0.0
    whole: int | None = None
    whole_in: tuple[Occasion, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (
            ("skip_below", self.skip_below),
            ("prefer_cached", self.prefer_cached),
        ):
            if not 0 <= value < 1:
                raise OptionError(f"{name}={value}: choose 0 or more, and less than 1.")
        if self.whole is not None and self.whole < 0:
            raise OptionError(f"whole={self.whole}: choose 0 or more.")
        if unknown := set(self.whole_in) - set(get_args(Occasion)):
            raise OptionError(
                f"whole_in={','.join(sorted(unknown))}: choose of {', '.join(get_args(Occasion))}."
            )

    @property
    def needs_host(self) -> bool:
        """Whether more than the order of the experts decides."""
        return bool(self.skip_below or self.prefer_cached) or self.whole is not None

    @property
    def ranked(self) -> int:
        """How many experts the router is to rank: with candidates to choose among, if so asked."""
        most = max(self.routed, self.k)
        return max(most, min(2 * most, MAX_CHOSEN)) if self.prefer_cached else most

    def settle(
        self, ids: U32, weights: F32, occasion: Occasion, cached: Callable[[int, bool], bool]
    ) -> Chosen:
        """From the `ranked` best experts of each token, the likeliest first. Their weights are
        shares of all the probability if cached ones are preferred, else as they are to be.
        `cached` tells of an expert whether it is, with both planes or the first."""
        if self.prefer_cached:
            if self.renormalise:
                weights = weights / weights[:, : self.routed].sum(axis=1, keepdims=True)
            if occasion != "prompt":
                ids, weights = self._swapped(ids, weights, occasion, cached)
        ids, weights = ids[:, : self.k].copy(), weights[:, : self.k].copy()
        skipped = weights < self.skip_below
        skipped[:, 0] = False
        # Nothing is read for it: the token's first expert is there, and counts for nothing here.
        ids = np.where(skipped, ids[:, :1], ids)
        weights = np.where(skipped, np.float32(0), weights)
        whole = None if self.whole is None else self._whole(occasion) & ~skipped
        return Chosen(ids, weights, whole)

    def _whole(self, occasion: Occasion) -> npt.NDArray[np.bool_]:
        """By rank."""
        whole = self.k if self.whole is None or occasion in self.whole_in else self.whole
        ranks: npt.NDArray[np.bool_] = np.arange(self.k) < whole
        return ranks

    def _swapped(
        self, ids: U32, weights: F32, occasion: Occasion, cached: Callable[[int, bool], bool]
    ) -> tuple[U32, F32]:
        """The likeliest of the rest stands in for the least likely of the chosen, and so on
        upwards: so every exchange is between neighbours, as far as can be."""
        ids, weights = ids.copy(), weights.copy()
        whole = self._whole(occasion).tolist()
        for row, odds in zip(ids, weights, strict=True):
            other = self.k
            for at in reversed(range(self.k)):
                if cached(int(row[at]), whole[at]):
                    continue
                enough = (1 - self.prefer_cached) * odds[at]
                while other < len(row) and odds[other] >= enough:
                    if cached(int(row[other]), whole[at]):
                        break
                    other += 1
                if other == len(row) or odds[other] < enough:
                    break
                row[at], odds[at] = row[other], odds[other]
                other += 1
        return ids, weights

    def lossy(self, own: int) -> list[str]:
        """What makes it other than the model's own choice, in words."""
        found = []
        if self.k != own:
            kept = ", with the weights they have among all" if self.routed > self.k else ""
            found.append(f"{self.k} experts of {own} a token{kept}")
        if self.skip_below:
            found.append(f"experts of a weight below {self.skip_below:g} skipped")
        if self.prefer_cached:
            found.append(
                f"cached experts instead of others up to {self.prefer_cached:.0%} likelier"
            )
        if self.whole is not None and self.whole < self.k:
            where = f", all in {' and '.join(self.whole_in)}" if self.whole_in else ""
            found.append(f"{self.whole} experts of {self.k} with all bits, the rest with 2{where}")
        return found
