"""Resident matrices on the CPU, by the native kernel: MLX's is scalar there.

They are two thirds of the bytes of a token of the 397B at K=4, and took MLX 6 to 9 times as long.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.kernels.native import RESIDENT_BITS, Native, Resident, resident
from flash_moe.kernels.spec import GROUP_SIZES


def multiplies(matrix: nn.Module) -> bool:
    """Whether the native kernel takes a matrix of mlx-lm's as it is."""
    return (
        "scales" in matrix
        and matrix.mode == "affine"
        and matrix.bits in RESIDENT_BITS
        and matrix.group_size in GROUP_SIZES
    )


class NativeLinear(nn.Module):
    """Stands where mlx.nn.QuantizedLinear stood; shares its arrays, as they are."""

    def __init__(self, inner: nn.QuantizedLinear, native: Native) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name in ("weight", "scales", "biases", "bias"):
            if name in inner:
                self[name] = inner[name]
        self.bits, self.group_size, self.mode = inner.bits, inner.group_size, inner.mode
        # Set while nobody will ask for what this computes. MLX's own, being lazy, needs no telling.
        self.skipped = False
        object.__setattr__(self, "_native", native)
        object.__setattr__(self, "_matrix", None)

    @property
    def rows(self) -> int:
        return int(self.weight.shape[0])

    def __call__(self, x: mx.array) -> mx.array:
        if self.skipped:
            return mx.zeros((*x.shape[:-1], self.rows), x.dtype)
        if self._matrix is None:
            object.__setattr__(self, "_matrix", self._open())
        given = np.array(x.astype(mx.float32), copy=False)
        y = mx.array(self._native.matmul(self._matrix, given)).astype(x.dtype)
        return y + self.bias if "bias" in self else y

    def _open(self) -> Resident:
        """At the first use: only then are the arrays certain to be in memory. They are not looked
        at again, so weights that change later change nothing."""
        weight, scales, biases = (shared(self[n]) for n in ("weight", "scales", "biases"))
        return resident(weight, scales, biases, bits=self.bits, group_size=self.group_size)


def shared(array: mx.array) -> Any:
    """The array's own memory for numpy, which has no bfloat16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
