"""Records in two planes: their layout, what a manifest may claim about it, and what is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.checkpoint.locations import packed_layer
from flash_moe.errors import CheckpointError
from flash_moe.format.layout import (
    AFFINE,
    RECORD_ALIGNMENT,
    SECOND_PLANE,
    Layout,
    Quantization,
    in_one_plane,
    layout_from_json,
    make_layout,
)
from flash_moe.pack.two_planes import TwoPlanes
from flash_moe.stream.store import OFFSET, ExpertStore
from tests.strategies import edited, in_two_planes, layouts_of_4_bits, plane_layouts


def assert_planes(layout: Layout) -> None:
    """What computing from planes relies on: both are there, alike, and the second begins a page."""
    parts = {part.name: part for part in layout.parts}
    assert layout.two_planes == any(part.param in SECOND_PLANE for part in layout.parts)
    assert layout.first_plane_bytes % RECORD_ALIGNMENT == 0
    if not layout.two_planes:
        assert layout.first_plane_bytes == layout.stride
        return
    for name, packing in layout.quantization:
        first, second = ([parts[f"{name}.{q}"] for q in p] for p in (AFFINE, SECOND_PLANE))
        assert [(p.dtype, p.shape) for p in first] == [(p.dtype, p.shape) for p in second]
        assert all(p.offset + p.nbytes <= layout.first_plane_bytes for p in first)
        assert all(p.offset >= layout.first_plane_bytes for p in second)
        assert not any(p.in_second_plane for p in first)
        assert all(p.in_second_plane for p in second)
        assert packing is not None
        assert (packing.bits, packing.mode) == (4, "affine")
        rows, groups = first[1].shape
        assert (first[0].dtype, first[0].shape) == (
            "uint32",
            (rows, groups * packing.group_size // 16),
        )


@given(layouts_of_4_bits())
@settings(max_examples=100, deadline=None)
def test_planes_come_apart_and_together(source: Layout) -> None:
    layout = in_two_planes(source)
    assert_planes(layout)
    assert_planes(source)
    assert in_one_plane(layout) == in_one_plane(source) == source
    weights = {p.name: p.nbytes for p in layout.parts if p.param in ("weight", "rest")}
    assert sum(weights.values()) == sum(p.nbytes for p in source.parts if p.param == "weight")


@given(layouts_of_4_bits())
@settings(max_examples=100, deadline=None)
def test_packs_are_laid_out_so(source: Layout) -> None:
    assert TwoPlanes().layout(source, "switch") == in_two_planes(source)


@given(plane_layouts, st.data())
@settings(max_examples=300, deadline=None)
def test_an_edited_layout_is_refused_or_one_of_ours(layout: Layout, data: st.DataObject) -> None:
    assert layout_from_json(json.loads(json.dumps(layout.to_json()))) == layout
    try:
        parsed = layout_from_json(data.draw(edited(layout.to_json())))
    except CheckpointError:
        return
    arrays = [(part.projection, part.param, part.dtype, part.shape) for part in parsed.parts]
    assert parsed == make_layout(arrays, parsed.quantization)
    assert_planes(parsed)


@given(plane_layouts, st.data())
@settings(max_examples=200, deadline=None)
def test_half_a_plane_is_refused(layout: Layout, data: st.DataObject) -> None:
    """A part is missing or out of place, has another shape or type, or codes have other bits."""
    arrays = [(part.projection, part.param, part.dtype, part.shape) for part in layout.parts]
    packing = list(layout.quantization)
    matrix = [i for i, a in enumerate(arrays) if a[1] != "bias"]
    at = data.draw(st.sampled_from(matrix))
    name, param, dtype, shape = arrays[at]
    match data.draw(
        st.sampled_from(["leave out", "shape", "type", "types", "bits", "mode", "place"])
    ):
        case "leave out":
            del arrays[at]
        case "shape":
            grown = data.draw(st.sampled_from([(shape[0] + 1, shape[1]), (shape[0], shape[1] + 1)]))
            arrays[at] = name, param, dtype, grown
        case "type":
            arrays[at] = name, param, "uint16", shape
        case "types":
            twin = dict(zip((*AFFINE, *SECOND_PLANE), (*SECOND_PLANE, *AFFINE), strict=True))[param]
            for i, (projection, kind, _, size) in enumerate(arrays):
                if projection == name and kind in (param, twin):
                    arrays[i] = projection, kind, "uint16", size
        case "place":
            arrays.insert(0, arrays.pop())
        case change:
            other = {"bits": {"bits": 2}, "mode": {"mode": "mxfp4"}}[change]
            packing[0] = packing[0][0], replace(packing[0][1], **other)  # type: ignore[arg-type]
    wrong = make_layout(arrays, packing)
    with pytest.raises(CheckpointError):
        layout_from_json(json.loads(json.dumps(wrong.to_json())))


def test_planes_are_aligned_pieces(tmp_path: Path) -> None:
    shape = {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (768, 8)}
    packing = [(name, Quantization(4, 64, "affine")) for name in shape]
    arrays = [
        (name, param, *kind)
        for name, (rows, words) in shape.items()
        for param, kind in (
            ("weight", ("uint32", (rows, words))),
            ("scales", ("float32", (rows, words // 8))),
            ("biases", ("float32", (rows, words // 8))),
        )
    ]
    layout = in_two_planes(make_layout(arrays, packing))
    assert 0 < layout.first_plane_bytes < layout.stride
    (tmp_path / "experts").write_bytes(b"")
    store = ExpertStore([packed_layer("mlp", 3, layout, tmp_path / "experts")], "direct")
    for expert in range(3):
        first, start = layout.first_plane_bytes, expert * layout.stride
        for full, wanted in (
            (True, [[start, first, 0], [start + first, layout.stride - first, first]]),
            (False, [[start, first, 0]]),
        ):
            pieces = store.pieces(0, [expert], full=np.array([full]))
            assert pieces[:, OFFSET:].tolist() == wanted
    store.close()
