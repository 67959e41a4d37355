"""One typed function a GPU kernel: its shapes, its constants, its launch. The formulas are in the
shaders; what to call when is the runtime's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.arrays import mlx_dtype
from flash_moe.format.dtypes import BY_NAME
from flash_moe.kernels.interface import Shared
from flash_moe.kernels.shaders import GpuKind, kernel
from flash_moe.kernels.spec import U32, ExpertSpec, Matrix, SecondPlane

Constants = tuple[tuple[str, Any], ...]

LANES = 32


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a kernel is cut up; changes no result beyond the order of a sum."""

    rows: int = 4  # rows a simdgroup, whose x it shares
    simdgroups: int = 2
    columns: int = 16  # columns a lane takes at a time


@dataclass(frozen=True, slots=True)
class Tiles:
    """The work of a step, a row a tile: slot, first row, rows, their tokens. Slots with and without
    FULL are different ones: a tile is computed from one plane or from both."""

    table: mx.array
    count: int
    tokens: int
    pairs: int


def make_tiles(tokens: U32, slots: U32, tokens_a_tile: int = 1) -> Tiles:
    """A row of h for every (token, slot) pair, in the pairs' order. Pairs of one slot share tiles
    of up to `tokens_a_tile` where they are neighbours."""
    pairs = len(slots)
    if tokens_a_tile == 1:
        # Decoding: 1.4 µs a layer, against 20 the general way.
        single = np.ones((pairs, 4), np.uint32)
        single[:, 0], single[:, 1], single[:, 3] = slots, np.arange(pairs), tokens
        return Tiles(mx.array(single), pairs, 1, pairs)
    starts = np.flatnonzero(np.r_[True, slots[1:] != slots[:-1]])
    counts = np.diff(np.r_[starts, pairs])
    pieces = -(-counts // tokens_a_tile)
    owner = np.repeat(np.arange(len(starts)), pieces)
    piece = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = starts[owner] + piece * tokens_a_tile
    table = np.empty((len(owner), 3 + tokens_a_tile), np.uint32)
    table[:, 0], table[:, 1] = slots[first], first
    table[:, 2] = np.minimum(counts[owner] - piece * tokens_a_tile, tokens_a_tile)
    # A place after the last pair is never used; it only has to be a token.
    places = np.minimum(first[:, None] + np.arange(tokens_a_tile), pairs - 1)
    table[:, 3:] = tokens[places]
    return Tiles(mx.array(table), len(owner), tokens_a_tile, pairs)


def gate_up(
    kind: GpuKind, spec: ExpertSpec, x: mx.array, bank: mx.array, tiles: Tiles, tuning: Tuning
) -> mx.array:
    """silu(gate·x) * (up·x), float32 [pairs, intermediate], rows in the tiles' order."""
    run = kernel(kind, "expert_gate_up_swiglu", ("x", "bank", "tiles"), ("h",))
    rows, groups = spec.intermediate, tuning.simdgroups
    h: list[mx.array] = run(
        inputs=[x, bank, tiles.table],
        template=[
            ("T", x.dtype),
            ("TOKENS", tiles.tokens),
            ("ROWS", tuning.rows),
            *_matrices(spec, tuning.columns, "gate", "up"),
        ],
        grid=(LANES * groups, -(-rows // (tuning.rows * groups)), tiles.count),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[(tiles.pairs, rows)],
        output_dtypes=[mx.float32],
    )
    return h[0]


def down(
    kind: GpuKind,
    spec: ExpertSpec,
    h: mx.array,
    bank: mx.array,
    tiles: Tiles,
    dtype: mx.Dtype,
    tuning: Tuning,
) -> mx.array:
    """down·h for every pair, [pairs, hidden], rows in the tiles' order."""
    run = kernel(kind, "expert_down", ("h", "bank", "tiles"), ("d",))
    rows, groups = spec.hidden, tuning.simdgroups
    d: list[mx.array] = run(
        inputs=[h, bank, tiles.table],
        template=[
            ("T", dtype),
            ("TOKENS", tiles.tokens),
            ("ROWS", tuning.rows),
            *_matrices(spec, tuning.columns, "down"),
        ],
        grid=(LANES * groups, -(-rows // (tuning.rows * groups)), tiles.count),
        threadgroup=(LANES * groups, 1, 1),
        output_shapes=[(tiles.pairs, rows)],
        output_dtypes=[dtype],
    )
    return d[0]


SHARED_NAMES = ("shared", "shared_gate")


def down_combine(
    kind: GpuKind,
    spec: ExpertSpec,
    h: mx.array,
    bank: mx.array,
    tiles: Tiles,
    weights: mx.array,
    shared: Shared,
    dtype: mx.Dtype,
    tuning: Tuning,
) -> mx.array:
    """The weighted sum of the experts and what is added to it, [tokens, hidden]. Tiles of one
    token, the k of a token together."""
    tokens, k = weights.shape
    names = ("h", "bank", "tiles", "weights", *SHARED_NAMES)
    run = kernel(kind, "expert_down_combine", names, ("y",))
    y: list[mx.array] = run(
        inputs=[h, bank, tiles.table, weights, *_shared_inputs(shared, dtype)],
        template=[
            ("T", dtype),
            ("K", k),
            ("ROWS", tuning.rows),
            *_matrices(spec, tuning.columns, "down"),
            ("SHARED", shared.output is not None),
        ],
        grid=(LANES * k, -(-spec.hidden // tuning.rows), tokens),
        threadgroup=(LANES * k, 1, 1),
        output_shapes=[(tokens, spec.hidden)],
        output_dtypes=[dtype],
    )
    return y[0]


def combine(
    kind: GpuKind, d: mx.array, place: U32, weights: mx.array, shared: Shared, dtype: mx.Dtype
) -> mx.array:
    """The same sum where the experts' outputs are there already: those of token t and its choice
    j in row place[t * k + j]."""
    tokens, k = weights.shape
    hidden, threads = d.shape[1], 256
    names = ("d", "place", "weights", *SHARED_NAMES)
    run = kernel(kind, "combine", names, ("y",))
    y: list[mx.array] = run(
        inputs=[d, mx.array(place), weights, *_shared_inputs(shared, dtype)],
        template=[("T", dtype), ("OUT", hidden), ("K", k), ("SHARED", shared.output is not None)],
        grid=(-(-hidden // threads) * threads, tokens, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(tokens, hidden)],
        output_dtypes=[dtype],
    )
    return y[0]


def router(
    kind: GpuKind, logits: mx.array, k: int, renormalise: bool, keep: int | None = None
) -> tuple[mx.array, mx.array]:
    """The k likeliest experts of each token and their weights, of which the first `keep` are given:
    uint32, float32 [tokens, keep]."""
    keep = k if keep is None else keep
    tokens, experts = logits.shape
    run = kernel(kind, "router_topk", ("logits",), ("ids", "weights"))
    ids, weights = run(
        inputs=[logits],
        template=[
            *(("T", logits.dtype), ("N", experts), ("K", k), ("KEEP", keep)),
            ("RENORMALISE", renormalise),
        ],
        grid=(LANES, tokens, 1),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(tokens, keep), (tokens, keep)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return ids, weights


@cache
def _matrices(spec: ExpertSpec, columns: int, *names: str) -> Constants:
    """The constants of a kernel that reads these matrices of a record."""
    first: Matrix = getattr(spec, names[0])
    size = BY_NAME[first.scale_type].nbytes
    found: list[tuple[str, Any]] = [
        ("S", mlx_dtype(first.scale_type)),
        ("BITS", first.bits),
        ("TWO_PLANES", spec.two_planes),
        ("GROUP", first.group_size),
        # Three bits end on a word border every 32 columns only.
        ("VPT", 32 if first.bits == 3 else min(columns, first.group_size)),
        ("IN", first.columns),
        ("OUT", first.rows),
        ("STRIDE", spec.stride // 4),
    ]
    for name in names:
        matrix: Matrix = getattr(spec, name)
        letter = name[0].upper()
        found += [
            (f"{letter}W", matrix.weight // 4),
            (f"{letter}S", matrix.scales // size),
            (f"{letter}B", matrix.biases // size),
        ]
        second = matrix.second or SecondPlane(0, 0, 0)
        found += [
            (f"{letter}RW", second.weight // 4),
            (f"{letter}RS", second.scales // size),
            (f"{letter}RB", second.biases // size),
        ]
    return tuple(found)


@cache
def _nothing(dtype: mx.Dtype) -> mx.array:
    return mx.zeros((1,), dtype)


def _shared_inputs(shared: Shared, dtype: mx.Dtype) -> list[mx.array]:
    arrays = (shared.output, shared.gate)
    return [_nothing(dtype) if array is None else array.astype(dtype) for array in arrays]
