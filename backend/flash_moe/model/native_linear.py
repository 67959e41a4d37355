"""Resident matrices on the CPU, by the native kernel: MLX's is scalar there.

They are two thirds of the bytes of a token of the 397B at K=4, and took MLX 6 to 9 times as long.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from flash_moe.arrays import numpy_view
from flash_moe.kernels.native import NativeKernels
from flash_moe.kernels.spec import GROUP_SIZES
from flash_moe.kernels.structs import RESIDENT_BITS, Resident, resident


def multiplies(matrix: nn.Module) -> bool:
    """Whether the native kernel takes a matrix of mlx-lm's as it is."""
    return (
        "scales" in matrix
        and matrix.mode == "affine"
        and matrix.bits in RESIDENT_BITS
        and matrix.group_size in GROUP_SIZES
    )


class NativeLinear(nn.Module):
    """Stands where mlx.nn.QuantizedLinear stood and shares its arrays. `skipped` is set while
    nobody needs what this computes; MLX's own matrices, being lazy, need no such flag."""

    weight: mx.array
    bits: int
    group_size: int

    def __init__(self, linear: nn.QuantizedLinear, kernels: NativeKernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name in ("weight", "scales", "biases", "bias"):
            if name in linear:
                self[name] = linear[name]
        self.bits, self.group_size, self.mode = linear.bits, linear.group_size, linear.mode
        self.skipped = False
        self.kernels = kernels
        self.resident: Resident | None = None

    @property
    def rows(self) -> int:
        return int(self.weight.shape[0])

    def __call__(self, x: mx.array) -> mx.array:
        if self.skipped:
            return mx.zeros((*x.shape[:-1], self.rows), x.dtype)
        if self.resident is None:
            self.resident = self._open()
        y = self.kernels.linear(self.resident, x)
        return y + self.bias if "bias" in self else y

    def _open(self) -> Resident:
        """At the first use: only then are the arrays certain to be in memory. They are not looked
        at again, so weights that change later change nothing."""
        weight, scales, biases = (numpy_view(self[n]) for n in ("weight", "scales", "biases"))
        return resident(weight, scales, biases, bits=self.bits, group_size=self.group_size)
