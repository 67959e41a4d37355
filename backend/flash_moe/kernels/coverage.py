"""Which records the fused kernels can read: a SwitchGLU's, affine, in the widths that they know."""

from __future__ import annotations

from flash_moe.format.layout import CODES, PLANE_BITS, RESTS, Layout, Part
from flash_moe.kernels.spec import BITS, GROUP_SIZES, SCALE_TYPES, ExpertSpec, Matrix, Rest


def expert_spec(layout: Layout, stride: int) -> ExpertSpec | None:
    """The spec of a SwitchGLU's record, or None if a kernel would have to do more than it can."""
    parts = {part.name: part for part in layout.parts}
    params = (*CODES, *RESTS) if layout.planes else CODES
    wanted = {f"{p}.{q}" for p in ("gate_proj", "up_proj", "down_proj") for q in params}
    if parts.keys() != wanted:
        return None
    gate, up, down = (_matrix(layout, parts, p) for p in ("gate_proj", "up_proj", "down_proj"))
    if gate is None or up is None or down is None:
        return None
    alike = (gate.bits, gate.group_size, gate.scale_type, gate.rows, gate.columns)
    if alike != (up.bits, up.group_size, up.scale_type, up.rows, up.columns):
        return None
    return ExpertSpec(gate, up, down, stride)


def _matrix(layout: Layout, parts: dict[str, Part], projection: str) -> Matrix | None:
    quantization = dict(layout.quantization)[projection]
    weight, scales, biases = (parts[f"{projection}.{param}"] for param in CODES)
    if (
        quantization is None
        or quantization.mode != "affine"
        or quantization.bits not in BITS
        or quantization.group_size not in GROUP_SIZES
        or scales.dtype not in SCALE_TYPES
        or scales.dtype != biases.dtype
    ):
        return None
    rows, groups = scales.shape
    rest = None
    if layout.planes:
        rest = Rest(*(parts[f"{projection}.{param}"].offset for param in RESTS))
    return Matrix(
        rows,
        groups * quantization.group_size,
        PLANE_BITS if rest else quantization.bits,
        quantization.group_size,
        scales.dtype,
        weight.offset,
        scales.offset,
        biases.offset,
        rest,
    )
