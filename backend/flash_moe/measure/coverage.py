"""Which layers of a model the kernels compute, and why the others are left to MLX: from headers."""

from __future__ import annotations

import mlx.nn as nn

from flash_moe.checkpoint.skeleton import Skeleton
from flash_moe.format.layout import CODES, RESTS, Layout, Quantization
from flash_moe.kernels.coverage import expert_spec
from flash_moe.kernels.spec import BITS, GROUP_SIZES, SCALE_TYPES


def left_to_mlx(skeleton: Skeleton) -> dict[str, str | None]:
    """For every switch layer why it is left to MLX, or None if the kernels cover it."""
    return {
        path: _reason(switch, skeleton.layout(path)) for path, switch in skeleton.switches.items()
    }


def _reason(switch: nn.Module, layout: Layout) -> str | None:
    """As experts/streamed.py decides it."""
    from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

    if type(switch) is not SwitchGLU:
        return f"it is a {type(switch).__name__}, not a SwitchGLU"
    if type(switch.activation) is not SwiGLU:
        return f"its activation is {type(switch.activation).__name__}, not SwiGLU"
    return None if expert_spec(layout, layout.stride) else _not_taken(layout)


def _not_taken(layout: Layout) -> str:
    """What `expert_spec` did not take, in the order in which it looks."""
    for projection, quantization in layout.quantization:
        if problem := _packing(quantization):
            return f"{projection} {problem}"
    if more := sorted({part.param for part in layout.parts} - {*CODES, *RESTS}):
        return f"its projections have a {' and a '.join(more)}"
    types = {part.dtype for part in layout.parts if part.param in CODES[1:]}
    if len(types) > 1 or not types <= set(SCALE_TYPES):
        return f"its scales and biases are {' and '.join(sorted(types))}"
    return "gate and up are packed in different ways"


def _packing(quantization: Quantization | None) -> str | None:
    if quantization is None:
        return "is not quantized"
    if quantization.mode != "affine":
        return f"is quantized as {quantization.mode}, not affine"
    if quantization.bits not in BITS:
        return f"has {quantization.bits} bits, not {', '.join(map(str, BITS))}"
    if quantization.group_size not in GROUP_SIZES:
        return f"has groups of {quantization.group_size}, not {', '.join(map(str, GROUP_SIZES))}"
    return None
