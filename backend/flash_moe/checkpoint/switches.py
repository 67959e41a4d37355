"""mlx-lm's switch layers: where they are in a model, and what one expert of them is made of."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flash_moe.arrays import dtype_name
from flash_moe.format.layout import Layout, Quantization, make_layout
from flash_moe.upstream import plain_projections, projection_types, switch_types


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """Every array of a module by its path, in the module's order."""
    flat: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return flat


def find_switches(model: nn.Module) -> dict[str, nn.Module]:
    """Switch layers by type, in the model's order; attribute names differ between models."""
    types = switch_types()
    switches = [
        (path, module) for path, module in model.named_modules() if isinstance(module, types)
    ]
    return dict(sorted(switches, key=lambda item: _natural(item[0])))


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    place: Any = model
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    if isinstance(place, list):
        place[int(last)] = module
    else:
        place[last] = module


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]


def shell(switch: nn.Module, layout: Layout) -> nn.Module:
    """mlx-lm's switch layer, its projections of the type that the layout's parts need."""
    plain, biased = plain_projections()
    for name, quantization in layout.quantization:
        parts = {part.param for part in layout.parts if part.projection == name}
        if quantization is None:
            if type(switch[name]) is plain and "bias" in parts:
                switch[name].__class__ = biased
        elif hasattr(switch[name], "to_quantized"):
            switch[name] = switch[name].to_quantized(
                group_size=quantization.group_size,
                bits=quantization.bits,
                mode=quantization.mode,
                global_scale="global_scale" in parts,
            )
    return switch


def record_layout(switch: nn.Module) -> Layout:
    """The record of one expert, from mlx-lm's own (lazy) arrays."""
    arrays, quantization = [], []
    for name, projection in switch.children().items():
        if not _is_projection(projection):
            continue
        bits = getattr(projection, "bits", None)
        quantization.append(
            (name, Quantization(bits, projection.group_size, projection.mode) if bits else None)
        )
        for param, array in projection.items():
            if isinstance(array, mx.array):
                arrays.append((name, param, dtype_name(array.dtype), tuple(array.shape[1:])))
    return make_layout(arrays, quantization)


def companions(switch: nn.Module) -> dict[str, nn.Module]:
    """What a switch layer holds besides its experts (muse_spark: a norm), which stays resident."""
    return {
        name: module
        for name, module in switch.children().items()
        if isinstance(module, nn.Module) and not _is_projection(module) and parameters(module)
    }


def _is_projection(module: Any) -> bool:
    return isinstance(module, projection_types())


def expert_count(switch: nn.Module) -> int:
    name, _ = record_layout(switch).quantization[0]
    return int(switch[name].weight.shape[0])
