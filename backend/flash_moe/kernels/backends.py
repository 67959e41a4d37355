"""The fused kernels behind one face: rows of experts, whole mixtures, routing.

A pair is one token and one of the experts that it chose. `rows` and `mixture` read the weights
where the bank has them, so their result must be fenced like any other that is computed from it.
Where records lie in two planes, spec.WHOLE in a pair's slot number has it computed from both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from flash_moe.kernels import gpu
from flash_moe.kernels.gpu import U32, Extras, Tuning
from flash_moe.kernels.native import Native, load_native
from flash_moe.kernels.runtime import Name
from flash_moe.kernels.shaders import GpuKind
from flash_moe.kernels.spec import ExpertSpec


class Memory(Protocol):
    """A lane of the bank, as a kernel sees it."""

    @property
    def words(self) -> mx.array: ...

    @property
    def address(self) -> int: ...


class Kernels(Protocol):
    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        """Whether MLX's own operations are the better choice for so many tokens an expert."""

    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        """expert_{slots[i]}(x[tokens[i]]) for every pair i, [pairs, hidden]."""

    def mixture(
        self,
        lane: Memory,
        spec: ExpertSpec,
        x: mx.array,
        slots: U32,
        weights: mx.array,
        extras: Extras,
    ) -> mx.array:
        """sum over k of weights[t, k] * expert_{slots[t, k]}(x[t]), plus extras, [t, hidden]."""

    def combine(
        self, rows: mx.array, place: U32, weights: mx.array, extras: Extras, dtype: mx.Dtype
    ) -> mx.array:
        """The same from rows that are there: those of (t, k) at place[t * K + k]."""

    def route(self, logits: mx.array, k: int, renormalise: bool) -> tuple[mx.array, mx.array]:
        """The k likeliest experts of each row of logits, and their weights."""


def make_kernels(name: Name) -> Kernels | None:
    """None for plain MLX."""
    if name == "mlx":
        return None
    return NativeKernels(load_native()) if name == "native" else GpuKernels(name)


@dataclass(frozen=True, slots=True)
class GpuKernels:
    kind: GpuKind

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        # Where MLX's Metal back end turns to matrix instructions, which ours do not use. Its CUDA
        # back end does not: at 16 tokens an expert it took 4.7 times as long as ours.
        return self.kind == "metal" and pairs >= 16 and pairs >= 4 * experts

    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        distinct = np.unique(slots)
        spec.check_choice(int(distinct[-1]))
        shared = tile_size(len(slots), len(distinct))
        tiles = gpu.make_tiles(tokens, slots, shared)
        tuning = tuning_for(shared)
        h = gpu.gate_up(self.kind, spec, x, lane.words, tiles, tuning[0])
        return gpu.down(self.kind, spec, h, lane.words, tiles, x.dtype, tuning[1])

    def mixture(
        self,
        lane: Memory,
        spec: ExpertSpec,
        x: mx.array,
        slots: U32,
        weights: mx.array,
        extras: Extras,
    ) -> mx.array:
        t, k = slots.shape
        tokens, flat = np.repeat(np.arange(t, dtype=np.uint32), k), slots.reshape(-1)
        distinct = np.unique(flat)
        spec.check_choice(int(distinct[-1]))
        if tile_size(t * k, len(distinct)) == 1:
            tiles, tuning = gpu.make_tiles(tokens, flat), tuning_for(1)
            h = gpu.gate_up(self.kind, spec, x, lane.words, tiles, tuning[0])
            return gpu.down_combine(
                self.kind, spec, h, lane.words, tiles, weights, extras, x.dtype, tuning[1]
            )
        order = np.argsort(flat, kind="stable")
        rows = self.rows(lane, spec, x, tokens[order], flat[order])
        return self.combine(rows, inverse(order), weights, extras, x.dtype)

    def combine(
        self, rows: mx.array, place: U32, weights: mx.array, extras: Extras, dtype: mx.Dtype
    ) -> mx.array:
        return gpu.combine(self.kind, rows, place, weights, extras, dtype)

    def route(self, logits: mx.array, k: int, renormalise: bool) -> tuple[mx.array, mx.array]:
        return gpu.router(self.kind, logits, k, renormalise)


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """Eager: the arrays that go in are computed now, and what comes out is there."""

    native: Native

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        return False

    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        given = _numpy(x)[tokens]
        out = self.native.experts(spec, lane.address, given, slots.reshape(-1, 1))
        return mx.array(out.reshape(len(slots), -1)).astype(x.dtype)

    def mixture(
        self,
        lane: Memory,
        spec: ExpertSpec,
        x: mx.array,
        slots: U32,
        weights: mx.array,
        extras: Extras,
    ) -> mx.array:
        y = mx.array(
            self.native.experts(spec, lane.address, _numpy(x), slots, weights=_numpy(weights))
        )
        return _with_extras(y, extras).astype(x.dtype)

    def combine(
        self, rows: mx.array, place: U32, weights: mx.array, extras: Extras, dtype: mx.Dtype
    ) -> mx.array:
        picked = rows[mx.array(place)].reshape(*weights.shape, -1)
        return _with_extras((picked * weights[..., None]).sum(axis=-2), extras).astype(dtype)

    def route(self, logits: mx.array, k: int, renormalise: bool) -> tuple[mx.array, mx.array]:
        ids, weights = self.native.router(_numpy(logits), k, renormalise)
        return mx.array(ids), mx.array(weights)


# Tokens a tile where experts are shared; tiles of 8 run out of registers. On an H200, µs a layer of
# 10 experts at 2 bits, tiles against one by one: 97 and 86 for 4 tokens an expert, 148 and 226 for
# 8, 297 and 506 for 16. MLX's sorted gather_qmm takes 378, 716 and 1,329.
TILE = 4
TILES_FROM = 6


def tile_size(pairs: int, experts: int) -> int:
    return TILE if pairs >= TILES_FROM * experts else 1


def tuning_for(tokens: int) -> tuple[Tuning, Tuning]:
    """For gate and up, and for down, whose rows are shorter. H200, K=4: 11.6 + 7.4 µs at 2 bits,
    12.2 + 8.0 at 4, the best of 21 cuts for both together."""
    if tokens == 1:
        return Tuning(rows=1, simdgroups=8, columns=32), Tuning(rows=4, simdgroups=8, columns=16)
    return Tuning(rows=2, simdgroups=4, columns=32), Tuning(rows=4, simdgroups=4, columns=16)


def inverse(order: Any) -> U32:
    place = np.empty(len(order), np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    return place


def _numpy(array: mx.array) -> Any:
    return np.array(array.astype(mx.float32), copy=False)


def _with_extras(y: mx.array, extras: Extras) -> mx.array:
    if extras.shared is not None and extras.gate is not None:
        y = y + mx.sigmoid(extras.gate.reshape(-1, 1)) * extras.shared
    return y if extras.residual is None else y + extras.residual
