"""Which records the kernels can read, and why they cannot read the others: a SwitchGLU's, affine,
in the widths that they know."""

from __future__ import annotations

from dataclasses import replace

import mlx.nn as nn

from flash_moe.format.layout import AFFINE, PLANE_BITS, SECOND_PLANE, Layout, Part, Quantization
from flash_moe.kernels.spec import (
    BITS,
    GROUP_SIZES,
    SCALE_TYPES,
    ExpertSpec,
    Matrix,
    SecondPlane,
)
from flash_moe.upstream import swiglu_types

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def why_unsupported(switch: nn.Module, layout: Layout) -> str | None:
    """Why the kernels leave a switch layer to MLX, or None if they compute it. By exact type: a
    subclass may compute something else."""
    switch_glu, swiglu = swiglu_types()
    if type(switch) is not switch_glu:
        return f"it is a {type(switch).__name__}, not a SwitchGLU"
    if type(switch.activation) is not swiglu:
        return f"its activation is {type(switch.activation).__name__}, not SwiGLU"
    if extra := sorted({part.param for part in layout.parts} - {*AFFINE, *SECOND_PLANE}):
        return f"its projections have a {' and a '.join(extra)}"
    dtypes = {part.name: part.dtype for part in layout.parts}
    for projection, quantization in layout.quantization:
        if problem := _packing_problem(quantization):
            return f"{projection} {problem}"
        kinds = {dtypes[f"{projection}.{param}"] for param in AFFINE[1:]}
        if len(kinds) > 1 or not kinds <= set(SCALE_TYPES):
            return f"its scales and biases are {' and '.join(sorted(kinds))}"
    parts = {part.name: part for part in layout.parts}
    gate, up = (_matrix(layout, parts, name) for name in PROJECTIONS[:2])
    places = {"weight": 0, "scales": 0, "biases": 0, "second": None}
    if replace(gate, **places) != replace(up, **places):  # type: ignore[arg-type]
        return "gate and up are packed in different ways"
    return None


def expert_spec(layout: Layout, stride: int) -> ExpertSpec:
    """The spec of a record that the kernels support."""
    parts = {part.name: part for part in layout.parts}
    gate, up, down = (_matrix(layout, parts, name) for name in PROJECTIONS)
    return ExpertSpec(gate, up, down, stride)


def _packing_problem(quantization: Quantization | None) -> str | None:
    if quantization is None:
        return "is not quantized"
    if quantization.mode != "affine":
        return f"is quantized as {quantization.mode}, not affine"
    if quantization.bits not in BITS:
        return f"has {quantization.bits} bits, not {', '.join(map(str, BITS))}"
    if quantization.group_size not in GROUP_SIZES:
        return f"has groups of {quantization.group_size}, not {', '.join(map(str, GROUP_SIZES))}"
    return None


def _matrix(layout: Layout, parts: dict[str, Part], projection: str) -> Matrix:
    quantization = dict(layout.quantization)[projection]
    assert quantization is not None
    weight, scales, biases = (parts[f"{projection}.{param}"] for param in AFFINE)
    rows, groups = scales.shape
    second = None
    if layout.two_planes:
        second = SecondPlane(*(parts[f"{projection}.{param}"].offset for param in SECOND_PLANE))
    return Matrix(
        rows,
        groups * quantization.group_size,
        PLANE_BITS if second else quantization.bits,
        quantization.group_size,
        scales.dtype,
        weight.offset,
        scales.offset,
        biases.offset,
        second,
    )
