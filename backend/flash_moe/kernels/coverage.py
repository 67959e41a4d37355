"""Which records the kernels can read, and why they cannot read the others: a SwitchGLU's, affine,
in the widths that they know."""

from __future__ import annotations

from dataclasses import replace

import mlx.nn as nn

from flash_moe.format.layout import AFFINE, SECOND_PLANE, Layout, Quantization
from flash_moe.kernels.spec import BITS, GROUP_SIZES, SCALE_TYPES, expert_spec
from flash_moe.upstream import swiglu_types


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
    spec = expert_spec(layout, 0)
    places = {"weight": 0, "scales": 0, "biases": 0, "second": None}
    if replace(spec.gate, **places) != replace(spec.up, **places):  # type: ignore[arg-type]
        return "gate and up are packed in different ways"
    return None


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
