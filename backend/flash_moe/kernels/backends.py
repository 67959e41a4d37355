"""What a runtime computes with kernels of ours: on the GPU, or native ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from flash_moe.kernels import gpu
from flash_moe.kernels.gpu import Tiles, Tuning
from flash_moe.kernels.gpu_operations import gpu_operations
from flash_moe.kernels.interface import Kernels, Memory, Shared
from flash_moe.kernels.native import load_native
from flash_moe.kernels.native_backend import NativeKernels
from flash_moe.kernels.native_operations import native_operations
from flash_moe.kernels.shaders import GpuKind
from flash_moe.kernels.spec import U32, ExpertSpec, inverse
from flash_moe.options import RuntimeName
from flash_moe.upstream import Replacement


def make_kernels(name: RuntimeName) -> Kernels | None:
    """None for plain MLX."""
    if name == "mlx":
        return None
    return NativeKernels(load_native()) if name == "native" else GpuKernels(name)


def make_operations(name: RuntimeName) -> dict[str, Replacement]:
    """For upstream.operations; none for plain MLX."""
    if name == "mlx":
        return {}
    return dict(native_operations() if name == "native" else gpu_operations(name))


@dataclass(frozen=True, slots=True)
class GpuKernels:
    kind: GpuKind

    @property
    def one_hand_over(self) -> bool:
        return self.kind == "cuda"

    def prefers_mlx(self, pairs: int, experts: int) -> bool:
        # Where MLX's Metal back end turns to matrix instructions, which ours do not use. Its CUDA
        # back end does not: at 16 tokens an expert it took 4.7 times as long as ours.
        return self.kind == "metal" and pairs >= 16 and pairs >= 4 * experts

    def rows(
        self, lane: Memory, spec: ExpertSpec, x: mx.array, tokens: U32, slots: U32
    ) -> mx.array:
        distinct = np.unique(slots)
        spec.check_slots(int(distinct[-1]))
        size = tile_size(len(slots), len(distinct))
        tiles = gpu.make_tiles(tokens, slots, size)
        tuning = tuning_for(size)
        h = gpu.gate_up(self.kind, spec, x, lane.words, tiles, tuning[0])
        return gpu.down(self.kind, spec, h, lane.words, tiles, x.dtype, tuning[1])

    def mixture(
        self,
        lane: Memory,
        spec: ExpertSpec,
        x: mx.array,
        slots: U32,
        weights: mx.array,
        shared: Shared,
    ) -> mx.array:
        t, k = slots.shape
        if t == 1:
            tiles = _tiles_of_a_token(spec, slots.tobytes())
            return self._one_by_one(lane, spec, x, tiles, weights, shared)
        tokens, flat = np.repeat(np.arange(t, dtype=np.uint32), k), slots.reshape(-1)
        distinct = np.unique(flat)
        spec.check_slots(int(distinct[-1]))
        if tile_size(t * k, len(distinct)) == 1:
            tiles = gpu.make_tiles(tokens, flat)
            return self._one_by_one(lane, spec, x, tiles, weights, shared)
        order = np.argsort(flat, kind="stable")
        rows = self.rows(lane, spec, x, tokens[order], flat[order])
        return self.combine(rows, inverse(order), weights, shared, x.dtype)

    def _one_by_one(
        self,
        lane: Memory,
        spec: ExpertSpec,
        x: mx.array,
        tiles: Tiles,
        weights: mx.array,
        shared: Shared,
    ) -> mx.array:
        tuning = tuning_for(1)
        h = gpu.gate_up(self.kind, spec, x, lane.words, tiles, tuning[0])
        return gpu.down_combine(
            self.kind, spec, h, lane.words, tiles, weights, shared, x.dtype, tuning[1]
        )

    def combine(
        self, rows: mx.array, place: U32, weights: mx.array, shared: Shared, dtype: mx.Dtype
    ) -> mx.array:
        return gpu.combine(self.kind, rows, place, weights, shared, dtype)

    def route(
        self, logits: mx.array, k: int, renormalise: bool, keep: int
    ) -> tuple[mx.array, mx.array]:
        return gpu.router(self.kind, logits, k, renormalise, keep)


@lru_cache(maxsize=256)
def _tiles_of_a_token(spec: ExpertSpec, slots: bytes) -> Tiles:
    """The same for nearly every token: the slots are 0, 1, … with a mark at those in full."""
    numbers = np.frombuffer(slots, np.uint32)
    spec.check_slots(int(np.max(numbers)))
    return gpu.make_tiles(np.zeros_like(numbers), numbers)


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
