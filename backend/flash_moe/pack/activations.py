"""What every column of every expert matrix is multiplied with: sums of squares, while a model runs.

The first matrices of a layer's experts share their input, so one vector a layer is enough; the last
one of each expert has its own. Sums are taken on the host in float64, of parts of a few hundred
rows that are added up in float32: how a text is cut into chunks changes no more than rounding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flash_moe.kernels.backends import NativeKernels
from flash_moe.kernels.native import Native, resident
from flash_moe.model.native_linear import multiplies, shared
from flash_moe.stream.streamed import Streamer

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# The first and the last matrix that mlx-lm's SwitchGLU and SwitchMLP multiply with.
FIRST, LAST = ("up_proj", "fc1"), ("down_proj", "fc2")


@dataclass(slots=True)
class LayerSums:
    """Of squares; `routed` counts the rows that each expert was given."""

    inputs: F64
    inner: F64
    routed: I64

    @property
    def rows(self) -> int:
        return int(self.routed.sum())


class Activations:
    """Sums of every layer while `watching`, by the layer's path."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerSums] = {}
        self._native: Native | None = None

    @contextmanager
    def watching(self, streamer: Streamer) -> Iterator[None]:
        """The experts are then computed here, where their insides can be seen."""
        kernels = streamer.kernels
        self._native = kernels.native if isinstance(kernels, NativeKernels) else None

        def record(
            layer: int, experts: list[int], inner: nn.Module, x: mx.array, local: mx.array
        ) -> mx.array:
            stored = streamer.store.layers[layer]
            return self._compute(stored.path, stored.experts, experts, inner, x, local)

        streamer.record, streamer.kernels = record, kernels and _WithoutExperts(kernels)
        try:
            yield
        finally:
            streamer.record, streamer.kernels = None, kernels

    def _compute(
        self,
        path: str,
        count: int,
        experts: list[int],
        inner: nn.Module,
        x: mx.array,
        local: mx.array,
    ) -> mx.array:
        """What mlx-lm's module gives, computed by it, but for the products of its matrices."""
        slots = np.array(local).reshape(-1)
        order = np.argsort(slots, kind="stable")
        ends = np.searchsorted(slots[order], range(1, len(experts) + 1)).tolist()
        x = mx.broadcast_to(x, (*local.shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])
        rows = x[mx.array(order // local.shape[-1])]
        seen: dict[str, list[mx.array]] = {}
        with _multiplied(inner, ends, self._native, seen):
            output: mx.array = inner(rows, mx.array(slots[order])[:, None])
        output = output.squeeze(-2)[mx.array(np.argsort(order))].reshape(*local.shape, -1)
        inputs, insides = (
            mx.stack(next(parts for name, parts in seen.items() if name in names))
            for names in (FIRST, LAST)
        )
        mx.eval(output, inputs, insides)
        self._add(path, count, experts, np.diff([0, *ends]), inputs, insides)
        return output

    def _add(
        self,
        path: str,
        count: int,
        experts: list[int],
        rows: Any,
        inputs: mx.array,
        insides: mx.array,
    ) -> None:
        if path not in self.layers:
            hidden, wide = inputs.shape[-1], insides.shape[-1]
            self.layers[path] = LayerSums(
                np.zeros(hidden), np.zeros((count, wide)), np.zeros(count, np.int64)
            )
        sums = self.layers[path]
        sums.inputs += np.array(inputs).sum(axis=0, dtype=np.float64)
        sums.inner[experts] += np.array(insides)
        sums.routed[experts] += rows


class _WithoutExperts:
    """Kernels that leave experts to the module that stands for mlx-lm's."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


@contextmanager
def _multiplied(
    inner: nn.Module, ends: list[int], native: Native | None, seen: dict[str, list[mx.array]]
) -> Iterator[None]:
    """Other products in the places of a module's matrices, for one call of it."""
    matrices = {name: inner[name] for name in (*FIRST, "gate_proj", *LAST) if name in inner}
    for name, matrix in matrices.items():
        parts = seen.setdefault(name, []) if name in (*FIRST, *LAST) else []
        inner[name] = _Product(matrix, ends, native, parts)
    try:
        yield
    finally:
        for name, matrix in matrices.items():
            inner[name] = matrix


class _Product:
    """Rows that lie sorted by expert, times the experts' matrices one after the other: with many
    rows for each, that is quicker than mlx-lm's way where no GPU is."""

    def __init__(
        self, matrix: nn.Module, ends: list[int], native: Native | None, seen: list[mx.array]
    ) -> None:
        self._matrix, self._ends, self._native, self._seen = matrix, ends, native, seen

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        flat, start = x.reshape(-1, x.shape[-1]), 0
        outputs = []
        for slot, end in enumerate(self._ends):
            rows, start = flat[start:end], end
            self._seen.append(mx.square(rows.astype(mx.float32)).sum(axis=0))
            outputs.append(self._times(rows, slot))
        output = mx.concatenate(outputs).reshape(*x.shape[:-1], -1)
        if "bias" in self._matrix:
            output = output + mx.expand_dims(self._matrix["bias"][indices], -2)
        return output

    def _times(self, rows: mx.array, slot: int) -> mx.array:
        matrix, codes = self._matrix, ("weight", "scales", "biases")
        if self._native is None or not multiplies(matrix):
            return dense(rows, self._full(slot, rows.dtype))
        opened = resident(
            *(shared(matrix[name][slot]) for name in codes),
            bits=matrix.bits,
            group_size=matrix.group_size,
        )
        given = np.array(rows.astype(mx.float32), copy=False)
        return mx.array(self._native.matmul(opened, given)).astype(rows.dtype)

    def _full(self, slot: int, dtype: mx.Dtype) -> mx.array:
        matrix = self._matrix
        if "scales" not in matrix:
            full: mx.array = matrix["weight"][slot]
            return full.astype(dtype)
        scales, biases = matrix["scales"][slot], None
        if matrix.mode == "affine":  # the type of the scales is that of the result
            scales, biases = scales.astype(dtype), matrix["biases"][slot].astype(dtype)
        return mx.dequantize(
            matrix["weight"][slot],
            scales,
            biases,
            group_size=matrix.group_size,
            bits=matrix.bits,
            mode=matrix.mode,
        ).astype(dtype)


def dense(rows: mx.array, matrix: mx.array) -> mx.array:
    """On a CPU by numpy, which has a fast BLAS: 80 rows times 192 × 256 take it 0.04 ms, and MLX
    on Linux 2.4."""
    if mx.default_device() != mx.cpu or rows.dtype != mx.float32:
        return rows @ matrix.T
    return mx.array(np.array(rows, copy=False) @ np.array(matrix, copy=False).T)
