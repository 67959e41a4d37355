"""How much errors in the columns of expert matrices count: the mean square of what each column was
multiplied with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flash_moe.pack.activations import LayerSums
from flash_moe.pack.products import LAST
from flash_moe.pack.transform import Columns

# Rows that count beside an expert's own, all columns alike in them, because few rows are partly
# noise. Two bits put flash-moe-tiny's last matrices off by 0.313 unweighed, by 0.291 weighed by 80
# rows an expert, and by 0.288 with these beside them. The mean over a layer says little about one
# of its experts: 0.310 (backend/benchmarks/calibration.md).
LEVEL_ROWS = 50


@dataclass(frozen=True, slots=True)
class ColumnImportance:
    """`layers` has the sums of every switch layer, by its path."""

    layers: dict[str, LayerSums]

    def of(self, path: str, projection: str, expert: int) -> Columns | None:
        sums = self.layers.get(path)
        if sums is None:
            return None
        if projection not in LAST:
            return (sums.inputs / sums.rows).astype(np.float32)
        rows, inner = int(sums.routed[expert]), sums.inner[expert]
        if not rows:
            return None
        level = LEVEL_ROWS / rows * inner.mean()
        columns: Columns = ((inner + level) / (rows + LEVEL_ROWS)).astype(np.float32)
        return columns

    @property
    def missed(self) -> int:
        """Experts that no token was routed to."""
        return sum(int((sums.routed == 0).sum()) for sums in self.layers.values())

    @property
    def experts(self) -> int:
        return sum(len(sums.routed) for sums in self.layers.values())
