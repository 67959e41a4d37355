"""Bytes are where `trace` says they are; it says nothing of tensors that are computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from flash_moe.checkpoint.trace import Pieces, View, entire, trace

DTYPES = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

Weights = dict[str, mx.array]
Move = tuple[str, Callable[[mx.array], mx.array]]


def sources() -> tuple[Weights, dict[str, np.ndarray]]:
    """Three source tensors, and their bytes: no two places hold the same four bytes."""
    arrays: Weights = {}
    buffers = {}
    for number, (name, shape, dtype) in enumerate(
        [("a", (6, 4, 8), mx.uint32), ("b", (6, 4, 8), mx.uint32), ("c", (4, 6, 16), mx.uint16)]
    ):
        count = prod(shape) * dtype.size // 4
        bytes_ = (np.arange(count, dtype=np.uint32) * 2654435761 + number * 40503).view(np.uint8)
        arrays[name] = mx.array(bytes_).view(dtype).reshape(shape)
        buffers[name] = bytes_
    mx.eval(arrays)
    return arrays, buffers


ARRAYS, BUFFERS = sources()


def raw(array: mx.array) -> np.ndarray:
    """The bytes of an array as MLX computes it."""
    if array.size == 0:
        return np.empty(0, np.uint8)
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))


def rebuilt(pieces: Pieces) -> np.ndarray:
    """The same bytes, fetched from the source buffers by place alone."""
    return np.concatenate([fetched(view) for view in pieces])


def fetched(view: View) -> np.ndarray:
    buffer = BUFFERS[view.source]
    if 0 in view.shape:
        return np.empty(0, np.uint8)
    # Every byte of the view by its own address, so that one outside is an error, not a wrap.
    at = np.full((), view.offset)
    for length, stride in zip(view.shape, view.strides, strict=True):
        at = at[..., None] + np.arange(length) * stride
    at = at[..., None] + np.arange(view.itemsize)
    assert 0 <= at.min() <= at.max() < len(buffer), view
    return buffer[at.reshape(-1)]


@st.composite
def moves(draw: st.DrawFn, shape: tuple[int, ...], dtype: Any) -> Move:
    """One operation of MLX's that moves no bytes of an array of this shape."""
    kinds = ["contiguous", "expand_dims", "reshape"]
    if shape:
        kinds += [
            "slice",
            "slice",
            "slice",
            "split",
            "split",
            "reverse",
            "unflatten",
            "unflatten",
            "flatten",
            "transpose",
            "swapaxes",
            "moveaxis",
            "double",
            "view",
        ]
    if 1 in shape:
        kinds += ["squeeze"]
    kind = draw(st.sampled_from(kinds))
    axes = st.integers(0, max(len(shape) - 1, 0))
    axis, other = draw(axes), draw(axes)
    if kind == "contiguous":
        return kind, lambda a: mx.contiguous(a)
    if kind == "expand_dims":
        return kind, lambda a: mx.expand_dims(a, axis)
    if kind == "squeeze":
        return kind, lambda a: mx.squeeze(a, shape.index(1))
    if kind == "reshape":
        new = draw(_shapes_of(prod(shape)))
        return kind, lambda a: mx.reshape(a, new)
    if kind == "view":
        to = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        assume(shape and shape[-1] * dtype.size % to.size == 0)
        return kind, lambda a: a.view(to)
    if kind == "flatten":
        return kind, lambda a: mx.flatten(a, min(axis, other), max(axis, other))
    if kind == "unflatten":
        inner = draw(
            st.sampled_from([n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0] or [1])
        )
        return kind, lambda a: mx.unflatten(a, axis, (shape[axis] // inner, inner))
    if kind == "split":
        at = sorted(draw(st.lists(st.integers(0, shape[axis]), min_size=1, max_size=2)))
        part = draw(st.integers(0, len(at)))
        return kind, lambda a: mx.split(a, at, axis)[part]
    if kind in ("slice", "reverse"):
        step = draw(st.sampled_from([1, 1, 2, 3] if kind == "slice" else [-1, -2]))
        ends = st.none() | st.integers(-shape[axis] - 1, shape[axis] + 1)
        cut = (slice(None),) * axis + (slice(draw(ends), draw(ends), step),)
        return kind, lambda a: a[cut]
    if kind == "transpose":
        order = draw(st.permutations(range(len(shape))))
        return kind, lambda a: mx.transpose(a, order)
    if kind == "swapaxes":
        return kind, lambda a: mx.swapaxes(a, axis, other)
    if kind == "moveaxis":
        return kind, lambda a: mx.moveaxis(a, axis, other)
    joining = draw(st.sampled_from([mx.stack, mx.concatenate]))
    return kind, lambda a: joining([a, a[::-1]])


@st.composite
def _shapes_of(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    if size == 0:
        return draw(st.sampled_from([(0,), (0, 3), (2, 0)]))
    shape = []
    for _ in range(draw(st.integers(0, 3))):
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    return (*shape, size)


@st.composite
def compositions(draw: st.DrawFn) -> tuple[list[str], Callable[[Weights], mx.array]]:
    """Three to six moves: some on each of one to three sources, which are then joined, and, as
    vendors' layouts do, cut or moved once more."""
    taken = draw(st.sampled_from(["a", "c", "ab", "ba", "bab"]))
    steps: list[Callable[[mx.array], mx.array]] = []
    names: list[str] = []

    def extend(array: mx.array, count: int) -> mx.array:
        for _ in range(count):
            name, move = draw(moves(tuple(array.shape), array.dtype))
            array = move(array)
            steps.append(move)
            names.append(name)
        return array

    joined = len(taken) > 1
    array = extend(ARRAYS[taken[0]], draw(st.integers(1, 3) if joined else st.integers(3, 6)))
    before = len(steps)
    joining = mx.concatenate if array.ndim and draw(st.booleans()) else mx.stack
    if joined:
        names.append("join")
        array = joining([array] * len(taken))
        if draw(st.booleans()) and array.ndim > 1:
            cut = (slice(None), slice(draw(st.integers(0, 1)), draw(st.integers(1, 9))))
            steps.append(lambda a: a[cut])
            names.append("cut")
        else:
            extend(array, draw(st.integers(1, 2)))

    def compose(weights: Weights) -> mx.array:
        parts = []
        for name in taken:
            part = weights[name]
            for move in steps[:before]:
                part = move(part)
            parts.append(part)
        combined = joining(parts) if joined else parts[0]
        for move in steps[before:]:
            combined = move(combined)
        return combined

    return names, compose


HITS: Counter[str] = Counter()


@given(compositions())
@settings(max_examples=500, deadline=None)
def _any_composition(composition: tuple[list[str], Callable[[Weights], mx.array]]) -> None:
    names, compose = composition
    array = compose(ARRAYS)

    def sanitize(weights: Weights) -> Weights:
        return {"moved": compose(weights), "untouched": weights["b"]}

    places = trace(sanitize, ARRAYS)
    assert places.keys() == {"moved", "untouched"}
    assert places["untouched"] == (entire("b", (6, 4, 8), 4),)
    pieces = places["moved"]
    HITS["all"] += 1
    if pieces is None:
        event("None")
        return
    HITS["placed"] += 1
    HITS["joined"] += len(pieces) > 1
    HITS.update(names)
    event("several pieces" if len(pieces) > 1 else "one piece")
    rows = sum(view.shape[0] for view in pieces) if len(pieces) > 1 else None
    if rows is not None:
        assert (rows, *pieces[0].shape[1:]) == tuple(array.shape)
    else:
        assert pieces[0].shape == tuple(array.shape)
    assert all(view.itemsize == array.dtype.size for view in pieces)
    assert (rebuilt(pieces) == raw(array)).all(), names
    if len(pieces) == 1 and array.ndim and array.shape[0]:
        last = array.shape[0] - 1
        assert (rebuilt((pieces[0].row(last),)) == raw(array[last])).all()


def test_any_composition_of_moves() -> None:
    HITS.clear()
    _any_composition()
    # A property of places is worth as much as the number of places that it saw.
    assert HITS["placed"] > HITS["all"] * 0.5, HITS
    assert HITS["joined"] > 20, HITS
    assert all(HITS[name] for name in ("cut", "slice", "split", "unflatten", "view")), HITS


@pytest.mark.parametrize(
    "move",
    [
        lambda w: w["a"][::-1],
        lambda w: w["a"][:, -1::-2],
        lambda w: w["a"][1:99:2, :9],
        lambda w: w["a"].transpose(2, 0, 1),
        lambda w: w["a"][:1].squeeze(0),
        lambda w: mx.moveaxis(w["a"], 0, -1),
        lambda w: w["a"][None, :, None],
        lambda w: w["c"].view(mx.uint32).reshape(2, 2, 6, 2, 4),
        lambda w: mx.concatenate([w["a"][1:, ::2], w["b"][::-1, :2]])[:, :, 2:9],
        lambda w: mx.contiguous(w["a"].swapaxes(1, 2)),
    ],
    ids=range(10),
)
def test_moves_have_a_place(move: Callable[[Weights], mx.array]) -> None:
    pieces = trace(lambda w: {"moved": move(w)}, ARRAYS)["moved"]
    assert pieces is not None
    assert (rebuilt(pieces) == raw(move(ARRAYS))).all()


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w["a"] + 1,
        lambda w: w["a"] * mx.array(1, mx.uint32),
        lambda w: w["a"].astype(mx.float32),
        lambda w: w["c"].astype(mx.uint32),
        lambda w: mx.from_fp8(w["c"].view(mx.uint8)),
        lambda w: mx.quantize(w["a"].astype(mx.float32).reshape(-1, 64), group_size=64, bits=4)[0],
        lambda w: mx.take(w["a"], mx.array([1, 0]), axis=0),
        lambda w: w["a"][mx.array([1, 0])],
        lambda w: mx.concatenate([w["a"], w["b"]], axis=1),
        lambda w: mx.stack([w["a"], w["b"]], axis=1),
        lambda w: mx.concatenate([w["a"], w["b"] + 1]),
        lambda w: mx.concatenate([w["a"], mx.zeros((1, 4, 8), mx.uint32)]),
        lambda w: mx.concatenate([w["a"], w["b"]]).transpose(1, 0, 2),
        lambda w: mx.concatenate([w["a"], w["b"]])[::-1],
        lambda w: mx.concatenate([w["a"], w["b"]])[1:],
        lambda w: mx.concatenate([w["a"], w["b"]]).view(mx.uint8),
        lambda w: mx.concatenate([w["a"], w["b"]]).reshape(4, 3, 4, 8),
        lambda w: w["a"].swapaxes(0, 1).reshape(-1),
        lambda w: w["a"][:, :, ::2].view(mx.uint8),
        lambda w: mx.broadcast_to(w["a"][:1], (6, 4, 8)),
        lambda w: mx.repeat(w["a"], 2, axis=0),
        lambda w: mx.zeros((6, 4, 8)),
        lambda w: mx.pad(w["a"], 1),
        lambda w: mx.roll(w["a"], 1),
        lambda w: mx.bitwise_and(w["a"], 15),
    ],
    ids=range(25),
)
def test_computed_tensors_have_no_place(compute: Callable[[Weights], mx.array]) -> None:
    places = trace(lambda w: {"computed": compute(w)}, ARRAYS)
    assert places == {"computed": None}


def test_a_computed_tensor_does_not_hide_the_others() -> None:
    places = trace(lambda w: {"x": w["a"] + 1, "y": w["a"][1:2], "z": w["c"]}, ARRAYS)
    assert places["x"] is None
    assert places["y"] == (View("a", 128, (1, 4, 8), (128, 32, 4), 4),)
    assert places["z"] == (entire("c", (4, 6, 16), 2),)


def test_one_tensor_under_two_names() -> None:
    places = trace(lambda w: {"x": w["a"], "y": w["a"], "z": w["b"]}, ARRAYS)
    assert places["x"] == places["y"] == (entire("a", (6, 4, 8), 4),)
    assert places["z"] == (entire("b", (6, 4, 8), 4),)


def test_nothing_is_read_and_contiguous_is_put_back() -> None:
    """Tracing a model larger than memory: placeholders only, even when `sanitize` fails."""
    own = mx.contiguous
    huge = {"w": mx.zeros((1 << 20, 1 << 20), mx.uint32)}
    before = mx.get_active_memory()
    trace(lambda w: {"w": mx.contiguous(w["w"].swapaxes(0, 1))}, huge)
    assert mx.get_active_memory() - before < 1 << 20

    def fails(weights: Weights) -> Weights:
        raise KeyError("missing")

    with pytest.raises(KeyError):
        trace(fails, ARRAYS)
    assert mx.contiguous is own


def test_an_expert_of_fused_and_stacked_weights() -> None:
    """gate and up fused in one tensor, as Qwen stores them: where is the up part of expert 2?"""
    places = trace(lambda w: {"up": mx.contiguous(w["a"][:, 2:, :])}, ARRAYS)
    (view,) = places["up"] or ()
    row = view.row(2)
    assert row == View("a", 2 * 128 + 64, (2, 8), (32, 4), 4)
    assert row.contiguous
    assert not view.contiguous
    assert (fetched(row) == raw(ARRAYS["a"][2, 2:])).all()
