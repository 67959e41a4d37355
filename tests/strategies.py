"""Strategies and makers that several test files share: small real files, and ways to break them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from flash_moe.format.dtypes import BY_SAFETENSORS, FLOATS
from flash_moe.format.layout import (
    AFFINE,
    RECORD_DTYPES,
    SECOND_PLANE,
    Layout,
    Quantization,
    make_layout,
)
from flash_moe.synth.model import Shape, synthesize

# The smallest Qwen3.5-MoE that MLX computes right on CUDA too: both kinds of attention, four switch
# layers, 0.4 s to write.
TINY = Shape(layers=4, experts=4, hidden=128, intermediate=128)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 1.0, 1e308])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def tiny_checkpoint(target: Path, **changes: Any) -> Path:
    """A real checkpoint of random weights."""
    synthesize(target, TINY, **changes)
    return target


@st.composite
def tensor_tables(draw: st.DrawFn) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes that a safetensors file may hold, scalars and empty tensors too."""
    names = draw(st.lists(st.text(max_size=12), unique=True, max_size=6))
    return {
        name: (
            draw(st.sampled_from(sorted(BY_SAFETENSORS))),
            draw(st.lists(st.integers(0, 5), max_size=4)),
        )
        for name in names
        if name != "__metadata__"
    }


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header, sound or not; `length` is a false length for it to claim."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    projections = draw(
        st.lists(st.sampled_from(["gate_proj", "up_proj", "fc1"]), min_size=1, unique=True)
    )
    arrays = []
    for projection in projections:
        params = draw(
            st.lists(
                st.sampled_from(["weight", "scales", "biases", "bias"]), min_size=1, unique=True
            )
        )
        for param in params:
            dtype = draw(st.sampled_from(sorted(RECORD_DTYPES)))
            shape = draw(st.lists(st.integers(1, 40), max_size=2))
            arrays.append((projection, param, dtype, tuple(shape)))
    quantizations = st.none() | st.builds(
        Quantization, st.integers(1, 8), st.sampled_from([32, 64]), st.sampled_from(["affine"])
    )
    return make_layout(arrays, [(name, draw(quantizations)) for name in projections])


@st.composite
def layouts_of_4_bits(draw: st.DrawFn) -> Layout:
    """Of records as mlx-lm has them, some with a bias beside each matrix."""
    packing = Quantization(4, draw(st.sampled_from([32, 64, 128])), "affine")
    dtype, bias = draw(st.sampled_from(FLOATS)), draw(st.booleans())
    names = draw(st.sampled_from([["gate_proj", "up_proj", "down_proj"], ["fc1", "fc2"]]))
    arrays: list[tuple[str, str, str, tuple[int, ...]]] = []
    for name in names:
        rows, groups = draw(st.integers(1, 40)), draw(st.integers(1, 4))
        arrays.append((name, "weight", "uint32", (rows, groups * packing.group_size // 8)))
        arrays += [(name, param, dtype, (rows, groups)) for param in AFFINE[1:]]
        arrays += [(name, "bias", dtype, (rows,))] if bias else []
    return make_layout(arrays, [(name, packing) for name in names])


def in_two_planes(layout: Layout) -> Layout:
    """The layout of the same experts in two planes: half of the words in each, scales in both."""
    first, second = [], []
    for part in layout.parts:
        halved = (part.shape[0], part.shape[-1] // 2) if part.param == "weight" else part.shape
        first.append((part.projection, part.param, part.dtype, halved))
        if part.param in AFFINE:
            param = SECOND_PLANE[AFFINE.index(part.param)]
            second.append((part.projection, param, part.dtype, halved))
    return make_layout([*first, *second], layout.quantization)


plane_layouts = layouts_of_4_bits().map(in_two_planes)


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a JSON value with one place changed, removed, or taken from another place."""
    copy = json.loads(json.dumps(value))
    places = list(_places(copy))
    parent, key = draw(st.sampled_from(places))
    action = draw(st.sampled_from(["replace", "remove", "swap", "repeat", "nudge"]))
    if action == "replace":
        parent[key] = draw(json_values)
    elif action == "remove":
        del parent[key]
    elif action == "swap":
        other, other_key = draw(st.sampled_from(places))
        parent[key], other[other_key] = json.loads(json.dumps([other[other_key], parent[key]]))
    elif action == "repeat" and isinstance(parent, list):
        parent.append(json.loads(json.dumps(parent[key])))
    elif isinstance(parent[key], int):
        parent[key] += draw(st.sampled_from([-1, 1, 64]))
    return copy


def _places(value: Any) -> Any:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])
