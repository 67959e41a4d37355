"""What a fused expert kernel must know about a record: where gate, up and down lie in it, and how
they are packed. Everything is plain numbers; a layout that the kernels do not cover has none."""

from __future__ import annotations

from dataclasses import dataclass

from flash_moe.experts.layout import Layout, Part

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_TYPES = ("bfloat16", "float16", "float32")
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection of one expert: `rows × columns`, affine, its parts at byte offsets."""

    rows: int
    columns: int
    bits: int
    group_size: int
    scale_type: str
    weight: int
    scales: int
    biases: int


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """down(silu(gate(x)) * up(x)), three matrices in a record; `stride` bytes between slots."""

    gate: Matrix
    up: Matrix
    down: Matrix
    stride: int

    @property
    def hidden(self) -> int:
        return self.gate.columns

    @property
    def intermediate(self) -> int:
        return self.gate.rows


def expert_spec(layout: Layout, stride: int) -> ExpertSpec | None:
    """The spec of a SwitchGLU's record, or None if a kernel would have to do more than it can."""
    parts = {part.name: part for part in layout.parts}
    wanted = {f"{p}.{q}" for p in ("gate_proj", "up_proj", "down_proj") for q in PARTS}
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
    weight, scales, biases = (parts[f"{projection}.{param}"] for param in PARTS)
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
    return Matrix(
        rows,
        groups * quantization.group_size,
        quantization.bits,
        quantization.group_size,
        scales.dtype,
        weight.offset,
        scales.offset,
        biases.offset,
    )
