"""What the kernels of CPU and GPU share of the gated delta rule: when they compute it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx

from flash_moe.upstream import Operation


@dataclass(frozen=True, slots=True)
class GatedDelta(ABC):
    """In the place of mlx-lm's `gated_delta_ops`, which `otherwise` is and which computes what does
    not fit: masks, several conversations, and what a kernel says."""

    otherwise: Operation

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        g: mx.array,
        beta: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        if state is None:
            state = mx.zeros((q.shape[0], *v.shape[2:], q.shape[3]))
        arrays = (q, k, v, g, beta, state)
        if mask is None and q.shape[0] == 1 and self.fits(*arrays):
            return self.compute(*arrays)
        own: tuple[mx.array, mx.array] = self.otherwise(*arrays, mask)
        return own

    @abstractmethod
    def fits(self, *arrays: mx.array) -> bool:
        """Whether a kernel takes q, k, v, g, beta and state, of one conversation."""

    @abstractmethod
    def compute(self, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        """The rows and the new state, as mlx-lm has them."""
