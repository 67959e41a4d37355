"""Layouts of records: aligned, in a manifest and back, and refused unless we write them so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.errors import CheckpointError
from flash_moe.format.layout import (
    PART_ALIGNMENT,
    RECORD_ALIGNMENT,
    Layout,
    align,
    layout_from_json,
    make_layout,
)
from tests.strategies import edited, json_values, layouts


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_layout_round_trip(layout: Layout) -> None:
    assert layout_from_json(json.loads(json.dumps(layout.to_json()))) == layout


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_parts_are_aligned_apart_and_inside(layout: Layout) -> None:
    end = 0
    for part in layout.parts:
        assert part.offset % PART_ALIGNMENT == 0
        assert end <= part.offset < end + PART_ALIGNMENT
        end = part.offset + part.nbytes
    assert layout.nbytes == end
    assert layout.stride % RECORD_ALIGNMENT == 0
    assert end <= layout.stride < end + RECORD_ALIGNMENT


@given(st.integers(0, 2**62), st.integers(1, 2**20))
def test_align(n: int, to: int) -> None:
    assert align(n, to) % to == 0
    assert n <= align(n, to) < n + to


@given(json_values)
@settings(max_examples=200, deadline=None)
def test_random_json_is_no_layout(value: Any) -> None:
    with pytest.raises(CheckpointError):
        layout_from_json(value)


@given(layouts(), st.data())
@settings(max_examples=300, deadline=None)
def test_an_edited_layout_is_refused_or_one_of_ours(layout: Layout, data: st.DataObject) -> None:
    try:
        parsed = layout_from_json(data.draw(edited(layout.to_json())))
    except CheckpointError:
        return
    arrays = [(part.projection, part.param, part.dtype, part.shape) for part in parsed.parts]
    assert parsed == make_layout(arrays, parsed.quantization)
    assert len({part.name for part in parsed.parts}) == len(parsed.parts) > 0
    assert {part.projection for part in parsed.parts} == {name for name, _ in parsed.quantization}


def test_two_parts_of_one_name_are_refused() -> None:
    twice = make_layout([("up", "weight", "uint8", (8,))] * 2, [("up", None)])
    with pytest.raises(CheckpointError):
        layout_from_json(json.loads(json.dumps(twice.to_json())))
