"""What every column of every expert matrix is multiplied with: sums of squares, while a model runs.

The first matrices of a layer's experts share their input, so one vector a layer is enough; the last
one of each expert has its own. Sums are taken on the host in float64, over parts of a few hundred
rows that are added up in float32: how a text is cut into chunks changes no more than rounding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_moe.arrays import float32_view
from flash_moe.kernels.native import Native
from flash_moe.kernels.native_backend import NativeKernels
from flash_moe.kernels.spec import inverse
from flash_moe.pack.products import FIRST, LAST, Squares, observed_matrices
from flash_moe.stream.streamed import StreamedLayer, Streamer

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class LayerSums:
    """Sums of squares: of the layer's `inputs` [hidden], and of each expert's `inner` activations
    [experts, intermediate]. `routed` counts the rows of each expert. The names are on disk."""

    inputs: F64
    inner: F64
    routed: I64

    @classmethod
    def zeros(cls, hidden: int, intermediate: int, experts: int) -> Self:
        inner = np.zeros((experts, intermediate))
        return cls(np.zeros(hidden), inner, np.zeros(experts, np.int64))

    @property
    def rows(self) -> int:
        return int(self.routed.sum())

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.inputs).all() and np.isfinite(self.inner).all())


class Activations:
    """The sums of every layer, by the layer's path. A streamer's recorder: while `recording`, the
    experts are computed here, where their insides can be seen."""

    def __init__(self, layers: dict[str, LayerSums] | None = None) -> None:
        self.layers = {} if layers is None else layers
        self._native: Native | None = None

    @contextmanager
    def recording(self, streamer: Streamer) -> Iterator[None]:
        kernels = streamer.kernels
        self._native = kernels.native if isinstance(kernels, NativeKernels) else None
        streamer.recorder = self
        try:
            yield
        finally:
            streamer.recorder = None

    def __call__(
        self, layer: StreamedLayer, experts: list[int], x: mx.array, slots: mx.array
    ) -> mx.array:
        """What mlx-lm's module gives, computed by it, except for the products of its matrices."""
        k, flat = slots.shape[-1], np.array(slots).reshape(-1)
        order = np.argsort(flat, kind="stable")
        ends = np.searchsorted(flat[order], range(1, len(experts) + 1))
        x = mx.broadcast_to(x, (*slots.shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])
        with observed_matrices(layer.switch, ends.tolist(), self._native) as squares:
            rows = x[mx.array(order // k)]
            output: mx.array = layer.switch(rows, mx.array(flat[order])[:, None])
        output = output.squeeze(-2)[mx.array(inverse(order))].reshape(*slots.shape, -1)
        inputs, inner = _matrix(squares, FIRST), _matrix(squares, LAST)
        mx.eval(output, inputs, inner)
        self._add(layer, experts, np.diff(ends, prepend=0), inputs, inner)
        return output

    def _add(
        self, layer: StreamedLayer, experts: list[int], rows: I64, inputs: mx.array, inner: mx.array
    ) -> None:
        stored = layer.streamer.store.layers[layer.number]
        if stored.path not in self.layers:
            self.layers[stored.path] = LayerSums.zeros(
                inputs.shape[-1], inner.shape[-1], stored.experts
            )
        sums = self.layers[stored.path]
        sums.inputs += float32_view(inputs).sum(axis=0, dtype=np.float64)
        sums.inner[experts] += float32_view(inner)
        sums.routed[experts] += rows


def _matrix(squares: Squares, names: tuple[str, ...]) -> mx.array:
    """Of the one matrix that has one of the names [experts, columns]."""
    return mx.stack(next(sums for name, sums in squares.items() if name in names))
