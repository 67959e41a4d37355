"""Follow tensors through mlx-lm's `sanitize` without reading one.

Each architecture's `sanitize` turns the vendor's names and layouts into mlx-lm's. We run it on
placeholders, take the graph that MLX records, and read off where every byte of an output lies
in the source files: slices, splits, stacks and reshapes move no bytes, so an expert can be read
where it is. Anything that computes (a transpose that stays, a dequantization) gives None, and
the checkpoint must be packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import mlx.core as mx

from flash_moe.upstream import without_contiguous

Weights = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class View:
    """A strided window on one source tensor; offset and strides in bytes."""

    source: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize

    @property
    def contiguous(self) -> bool:
        return self.strides == _row_major(self.shape, self.itemsize) or 0 in self.shape

    def row(self, index: int) -> View:
        """`self[index]`: one expert of a stack."""
        offset = self.offset + index * self.strides[0]
        return replace(self, offset=offset, shape=self.shape[1:], strides=self.strides[1:])


def entire(source: str, shape: tuple[int, ...], itemsize: int) -> View:
    """All of one source tensor."""
    return View(source, 0, shape, _row_major(shape, itemsize), itemsize)


# An array as views concatenated along its first axis; most have one, un-fused experts have many.
Pieces = tuple[View, ...]


def trace(
    sanitize: Callable[[Weights], Weights],
    weights: Mapping[str, mx.array],
    sources: dict[str, frozenset[str]] | None = None,
) -> dict[str, Pieces | None]:
    """Where every array that `sanitize` returns lies in `weights`; None where it is computed.

    `sources` is filled with the names that each is made of, computed or not; not at all if they
    cannot be known."""
    names = list(weights)
    inputs = [mx.zeros(weights[name].shape, weights[name].dtype) for name in names]
    outputs: list[str] = []
    nodes: list[dict[str, Any]] = []

    def run(*arrays: mx.array) -> list[mx.array]:
        sanitized = sanitize(dict(zip(names, arrays, strict=True)))
        outputs.extend(sanitized)
        return list(sanitized.values())

    try:
        with without_contiguous():
            mx.export_function(nodes.append, run, *inputs)
    except ValueError:
        # A primitive without exportable state (from_fp8), or a look at a value: it computes.
        return dict.fromkeys(outputs)
    graph = _Graph(names)
    for node in nodes:
        graph.add(node)
    if sources is not None:
        sources |= {
            name: graph.sources.get(key, frozenset())
            for name, key in zip(outputs, graph.outputs, strict=True)
        }
    return {name: graph.values.get(key) for name, key in zip(outputs, graph.outputs, strict=True)}


class _Graph:
    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.values: dict[str, Pieces | None] = {}
        self.sources: dict[str, frozenset[str]] = {}
        self.outputs: list[str] = []

    def add(self, node: dict[str, Any]) -> None:
        if node["type"] == "inputs":
            for name, (key, shape, dtype) in zip(self.names, node["inputs"], strict=True):
                self.values[key] = (entire(name, tuple(shape), dtype.size),)
                self.sources[key] = frozenset((name,))
        elif node["type"] == "outputs":
            self.outputs = [key for key, *_ in node["outputs"]]
        elif node["type"] == "primitive":
            inputs = [self.values.get(key) for key, *_ in node["inputs"]]
            results = _apply(node, inputs)
            sources = [self.sources.get(key, frozenset()) for key, *_ in node["inputs"]]
            for (key, *_), value in zip(node["outputs"], results, strict=True):
                self.values[key] = value
                self.sources[key] = frozenset().union(*sources)


def _apply(node: dict[str, Any], inputs: list[Pieces | None]) -> list[Pieces | None]:
    name, outputs = node["name"], node["outputs"]
    unknown: list[Pieces | None] = [None] * len(outputs)
    known = [pieces for pieces in inputs if pieces is not None]
    if len(known) != len(inputs) or not inputs:
        return unknown
    if name == "Concatenate":
        joined = tuple(view for pieces in known for view in pieces)
        return [joined] if node["arguments"][0] == 0 else unknown
    if name not in _MOVES or len(inputs) != 1:
        return unknown
    pieces = known[0]
    if len(pieces) > 1:
        # Moves over a stack keep its pieces only where they leave the first axis alone.
        return [_slice_stack(pieces, node)] if name == "Slice" else unknown
    moved = _MOVES[name](pieces[0], node)
    return [None if view is None else (view,) for view in moved]


def _slice(view: View, shape: tuple[int, ...], start: Any, step: Any) -> View:
    """The shape is the output's: the end of a slice may lie outside, and does for `[::-1]`."""
    offset = view.offset + sum(a * s for a, s in zip(start, view.strides, strict=True))
    strides = tuple(s * c for s, c in zip(view.strides, step, strict=True))
    return replace(view, offset=offset, shape=shape, strides=strides)


def _slice_one(view: View, node: dict[str, Any]) -> list[View | None]:
    start, _, step = node["arguments"]
    return [_slice(view, tuple(node["outputs"][0][1]), start, step)]


def _slice_stack(pieces: Pieces, node: dict[str, Any]) -> Pieces | None:
    start, _, step = node["arguments"]
    rows, *inner = node["outputs"][0][1]
    if rows != sum(view.shape[0] for view in pieces) or (start[0], step[0]) != (0, 1):
        return None
    return tuple(_slice(view, (view.shape[0], *inner), start, step) for view in pieces)


def _split(view: View, node: dict[str, Any]) -> list[View | None]:
    _, axis = node["arguments"]
    at, parts = 0, list[View | None]()
    for _, shape, _ in node["outputs"]:
        offset = view.offset + at * view.strides[axis]
        parts.append(replace(view, offset=offset, shape=tuple(shape)))
        at += shape[axis]
    return parts


def _transpose(view: View, node: dict[str, Any]) -> list[View | None]:
    axes = node["arguments"][0]
    shape = tuple(view.shape[a] for a in axes)
    return [replace(view, shape=shape, strides=tuple(view.strides[a] for a in axes))]


def _reshape(view: View, node: dict[str, Any]) -> list[View | None]:
    """Reshape, flatten, unflatten, squeeze, expand_dims: a view if no byte has to move."""
    shape = tuple(node["outputs"][0][1])
    strides = _reshaped_strides(view, shape)
    return [None if strides is None else replace(view, shape=shape, strides=strides)]


def _reinterpret(view: View, node: dict[str, Any]) -> list[View | None]:
    """`array.view(dtype)` changes the length of the last axis, which must be contiguous."""
    _, shape, dtype = node["outputs"][0]
    if not view.shape or view.strides[-1] != view.itemsize:
        return [None]
    strides = (*view.strides[:-1], dtype.size)
    return [replace(view, shape=tuple(shape), strides=strides, itemsize=dtype.size)]


_MOVES: dict[str, Callable[[View, dict[str, Any]], list[View | None]]] = {
    "Slice": _slice_one,
    "Split": _split,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Unflatten": _reshape,
    "ExpandDims": _reshape,
    "Squeeze": _reshape,
    "View": _reinterpret,
}


def _row_major(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _reshaped_strides(view: View, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Match runs of old axes to runs of new axes of the same size (numpy's no-copy rule)."""
    old = [(n, s) for n, s in zip(view.shape, view.strides, strict=True) if n != 1]
    strides: list[int] = []
    new = list(shape)
    while new:
        if new[0] == 1 and (not old or len(strides) < len(shape)):
            # An axis of length one may have any stride.
            strides.append(view.itemsize)
            new.pop(0)
            continue
        if not old:
            return None
        run_old, run_new = [old.pop(0)], [new.pop(0)]
        while prod(n for n, _ in run_old) != prod(run_new):
            if prod(n for n, _ in run_old) < prod(run_new):
                if not old:
                    return None
                run_old.append(old.pop(0))
            elif new:
                run_new.append(new.pop(0))
            else:
                return None
        for (_, outer), (length, inner) in pairwise(run_old):
            if outer != length * inner:
                return None
        strides += _row_major(tuple(run_new), run_old[-1][1])
    return None if old else tuple(strides)
