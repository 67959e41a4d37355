"""Which bits of an expert are read and computed from, where a pack has them in two planes.

In full: from both planes, all 4 bits. Otherwise from the first plane alone, 2 bits, for half of the
reading. Packs of one plane have no choice: there, nothing here changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flash_moe.options import Phase

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Precision:
    """The `full_experts` weightiest experts of a token are computed in full (None: all of them),
    and in the phases `full_in` all of them whatever their weight."""

    full_experts: int | None = None
    full_in: tuple[Phase, ...] = ()

    @property
    def by_rank(self) -> bool:
        """Whether it depends on how much an expert weighs."""
        return self.full_experts is not None

    def full_ranks(self, k: int, phase: Phase) -> Flags:
        """For the experts of a token, the weightiest first."""
        count = k if self.full_experts is None or phase in self.full_in else self.full_experts
        ranks: Flags = np.arange(k) < count
        return ranks

    def all_full(self, phase: Phase) -> bool:
        """For experts whose rank is not known: all in full, or none."""
        return self.full_experts is None or phase in self.full_in

    def lossy(self, k: int) -> str | None:
        """What makes it less exact than all 4 bits, in words."""
        if self.full_experts is None or self.full_experts >= k:
            return None
        where = f", all of them in {' and '.join(self.full_in)}" if self.full_in else ""
        return f"{self.full_experts} experts of {k} at 4 bits, the others at 2{where}"
