"""The native kernels on MLX's arrays: experts and resident matrices.

MLX multiplies matrices of few bits with scalar code on a CPU. Resident matrices are two thirds of
the bytes of a token of the 397B at K=4, and took MLX 6 to 9 times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.arrays import numpy_view
from flash_moe.kernels.interface import Memory, Shared
from flash_moe.kernels.native import Native
from flash_moe.kernels.spec import F32, GROUP_SIZES, U32, ExpertSpec
from flash_moe.kernels.structs import RESIDENT_BITS, Resident, resident


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """The kernels for MLX's arrays. Eager: arrays that go in are computed now, and so are those
    that come out."""

    native: Native

    @property
    def one_hand_over(self) -> bool:
        return False

    def linear(self, matrix: Resident, x: mx.array) -> mx.array:
        """x · matrix, in the type of x."""
        return mx.array(self.native.matmul(matrix, _float32(x))).astype(x.dtype)

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        return False

    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        x_rows = _float32(x)[tokens]
        out = self.native.experts(spec, lane.parts(spec), x_rows, slots.reshape(-1, 1))
        return mx.array(out.reshape(len(slots), -1)).astype(x.dtype)

    def mixture(
        self,
        lane: Memory,
        spec: ExpertSpec,
        x: mx.array,
        slots: U32,
        weights: mx.array,
        shared: Shared,
    ) -> mx.array:
        y = mx.array(
            self.native.experts(
                spec, lane.parts(spec), _float32(x), slots, weights=_float32(weights)
            )
        )
        return _with_shared(y, shared).astype(x.dtype)

    def combine(
        self, rows: mx.array, place: U32, weights: mx.array, shared: Shared, dtype: mx.Dtype
    ) -> mx.array:
        picked = rows[mx.array(place)].reshape(*weights.shape, -1)
        return _with_shared((picked * weights[..., None]).sum(axis=-2), shared).astype(dtype)

    def route(
        self, logits: mx.array, k: int, renormalise: bool, keep: int
    ) -> tuple[mx.array, mx.array]:
        ids, weights = self.native.router(_float32(logits), k, renormalise)
        return mx.array(ids[:, :keep]), mx.array(weights[:, :keep])


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


def _float32(array: mx.array) -> F32:
    """The array's own memory, where it is in float32 already."""
    return np.array(array.astype(mx.float32), copy=False)


def _with_shared(y: mx.array, shared: Shared) -> mx.array:
    if shared.output is None or shared.gate is None:
        return y
    return y + mx.sigmoid(shared.gate.reshape(-1, 1)) * shared.output
