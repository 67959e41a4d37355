"""What mlx-lm makes of a checkpoint before a weight is read: its model, and where its experts are.

mlx-lm's own loader does the work, lazily, so every architecture, quantization and vendor layout
that it supports is supported here. We trace what its `sanitize` does (trace.py) and find the switch
layers by type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_moe.checkpoint.folder import (
    Folder,
    experts_per_token,
    routed_experts,
    with_experts_per_token,
)
from flash_moe.checkpoint.locations import ExpertLayer, Run, packed_layer
from flash_moe.checkpoint.switches import (
    companions,
    expert_count,
    find_switches,
    parameters,
    record_layout,
    set_module,
    shell,
)
from flash_moe.checkpoint.trace import Pieces, View, entire, trace
from flash_moe.errors import CheckpointError, NotContiguous, Remedy, UnsupportedModel
from flash_moe.format.dtypes import BY_SAFETENSORS
from flash_moe.format.layout import Layout, in_one_plane
from flash_moe.format.safetensors import Tensor
from flash_moe.upstream import load_model_lazily, model_classes

# What mlx-lm's models raise on configs and weights that they were not written for.
MLX_LM_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

Provenance = dict[str, Pieces | None]
# What each of sanitize's outputs is made of.
Sources = dict[str, frozenset[str]]


@dataclass(slots=True)
class Skeleton:
    """mlx-lm's model with lazy arrays; `switches` are its switch layers, by path."""

    folder: Folder
    model: nn.Module
    config: dict[str, Any]
    switches: dict[str, nn.Module]
    _provenance: Provenance
    _sources: Sources

    @property
    def experts_per_token(self) -> int:
        return experts_per_token(self.config) or 1

    def layout(self, path: str) -> Layout:
        if self.folder.manifest is not None:
            return self.folder.manifest.layer(path).layout
        return record_layout(self.switches[path])

    def expert_count(self, path: str) -> int:
        if self.folder.manifest is not None:
            return self.folder.manifest.layer(path).experts
        return expert_count(self.switches[path])

    def layers(self) -> list[ExpertLayer]:
        """Every switch layer with the place of its experts, or NotContiguous."""
        return [self.layer(path) for path in self.switches]

    def layer(self, path: str) -> ExpertLayer:
        if self.folder.manifest is None:
            return self._layer_in_place(path)
        layer = self.folder.manifest.layer(path)
        return packed_layer(path, layer.experts, layer.layout, self.folder.path / layer.file)

    def replace(self, make: Callable[[int, nn.Module], nn.Module]) -> None:
        """Put another module in the place of every switch layer; its lazy arrays go with it."""
        for number, (path, switch) in enumerate(self.switches.items()):
            set_module(self.model, path, make(number, switch))

    def resident(self) -> dict[str, mx.array]:
        """Parameters that are no expert's, still lazy. Complete only after `replace`."""
        inside = tuple(
            f"{path}.{projection}."
            for path in self.switches
            for projection, _ in self.layout(path).quantization
        )
        flat = parameters(self.model)
        return {name: array for name, array in flat.items() if not name.startswith(inside)}

    def resident_sources(self) -> dict[str, frozenset[str]]:
        """The tensors of the checkpoint that each resident weight is made of; NotContiguous if
        they cannot be known."""
        resident = self.resident()
        if not self._sources:
            raise self._not_contiguous(next(iter(resident)))
        return {name: self._sources.get(name, frozenset()) for name in resident}

    def _layer_in_place(self, path: str) -> ExpertLayer:
        layout = self.layout(path)
        experts = expert_count(self.switches[path])
        runs = []
        for part in layout.parts:
            name = f"{path}.{part.name}"
            run = _run(self._provenance.get(name), experts, part.nbytes, part.offset, self.folder)
            if run is None:
                raise self._not_contiguous(name)
            runs.append(run)
        return ExpertLayer(path, experts, layout, tuple(runs))

    def _not_contiguous(self, name: str) -> NotContiguous:
        return NotContiguous(
            f"{self.folder.path}: the experts of this {self.folder.architecture} are not stored "
            f"one by one ({name}), so they cannot be streamed in place. Pack the checkpoint first.",
            Remedy.PACK,
            self.folder.path,
        )


def open_skeleton(folder: Folder, experts: int | None = None) -> Skeleton:
    """Build the model of a folder lazily; `experts` is another K than the config's."""
    config = with_experts_per_token(folder.config, experts)
    provenance: Provenance = {}
    sources: Sources = {}
    switches: dict[str, nn.Module] = {}

    def classes(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], type]:
        model_class, args_class = model_classes(config)

        def build(args: Any) -> nn.Module:
            model = model_class(args)
            if folder.manifest is not None:
                _expect_pack(model, folder, switches)
            elif hasattr(model, "sanitize"):
                _watch_sanitize(model, provenance, sources)
            return model

        return build, args_class

    model, config = _load_lazily(folder, config, classes)
    if folder.manifest is None:
        switches = find_switches(model)
        _require_moe(folder, switches)
        _refuse_whole_experts(folder, model, switches)
        if _renamed_after_sanitize(folder.config):
            provenance, sources = {}, {}
        elif not provenance:
            provenance = _as_named(folder.tensors)
            sources = {name: frozenset((name,)) for name in folder.tensors}
    return Skeleton(folder, model, config, switches, provenance, sources)


def _load_lazily(
    folder: Folder, config: dict[str, Any], classes: Any
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        return load_model_lazily(folder.path, config, classes)
    except MLX_LM_REFUSALS as error:
        raise UnsupportedModel(
            f"mlx-lm cannot build a {folder.architecture} from {folder.path}: "
            f"{_first_line(error)}. A newer mlx-lm may know it.",
            Remedy.UPGRADE_MLX_LM,
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:200].rstrip(".")
    return text if isinstance(error, ValueError) else f"{type(error).__name__} {text}"


def _watch_sanitize(model: nn.Module, provenance: Provenance, sources: Sources) -> None:
    sanitize = model.sanitize

    def watched(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        traced = trace(sanitize, weights, sources)
        sanitized: dict[str, mx.array] = sanitize(weights)
        # A `sanitize` that looks at values cannot be traced at all: no output has a place then.
        provenance.update({name: traced.get(name) for name in sanitized})
        return sanitized

    object.__setattr__(model, "sanitize", watched)


def _expect_pack(model: nn.Module, folder: Folder, switches: dict[str, nn.Module]) -> None:
    """A pack's weights are sanitized already, and hold no experts: shells take their places."""
    assert folder.manifest is not None
    own = find_switches(model)
    if own.keys() != {layer.path for layer in folder.manifest.layers}:
        raise CheckpointError(
            f"{folder.path} was packed for other layers than this mlx-lm builds. Pack it again."
        )
    for layer in folder.manifest.layers:
        switches[layer.path] = shell(own[layer.path], layer.layout)
        if _shapes(record_layout(switches[layer.path])) != _shapes(in_one_plane(layer.layout)):
            raise CheckpointError(
                f"{folder.path}: the experts of {layer.path} are not of the shapes that this "
                "mlx-lm builds for its config. Pack the model again."
            )
        # mlx-lm then finds no experts to fill, but what lies beside them.
        place = nn.Module()
        for name, module in companions(switches[layer.path]).items():
            place[name] = module
        set_module(model, layer.path, place)
    object.__setattr__(model, "sanitize", lambda weights: weights)


def _shapes(layout: Layout) -> list[tuple[str, tuple[int, ...]]]:
    return sorted((part.name, part.shape) for part in layout.parts)


def _run(pieces: Pieces | None, experts: int, nbytes: int, at: int, folder: Folder) -> Run | None:
    """Where each expert's rows of one part start, if they are contiguous."""
    if not pieces or sum(view.shape[0] for view in pieces) != experts:
        return None
    firsts = [view.row(0) for view in pieces]
    if not all(row.contiguous and row.nbytes == nbytes for row in firsts):
        return None
    if len(pieces) == 1:
        file, base = _place(firsts[0], folder)
        return Run(file, base, pieces[0].strides[0], nbytes, at)
    rows = (view.row(i) for view in pieces for i in range(view.shape[0]))
    files, offsets = zip(*(_place(row, folder) for row in rows), strict=True)
    return Run(files[0], 0, 0, nbytes, at, offsets, files)


def _place(view: View, folder: Folder) -> tuple[Path, int]:
    tensor = folder.tensors[view.source]
    return tensor.file, tensor.offset + view.offset


def _as_named(tensors: dict[str, Tensor]) -> Provenance:
    """An architecture without `sanitize` takes the tensors as they are called."""
    return {
        name: (entire(name, tensor.shape, BY_SAFETENSORS[tensor.dtype].nbytes),)
        for name, tensor in tensors.items()
    }


def _renamed_after_sanitize(config: dict[str, Any]) -> bool:
    """AWQ and GPTQ weights are repacked by mlx-lm after `sanitize`: nothing lies as it is used."""
    quantization = config.get("quantization_config") or {}
    return isinstance(quantization, dict) and quantization.get("quant_method") in ("awq", "gptq")


def _require_moe(folder: Folder, switches: dict[str, nn.Module]) -> None:
    if switches:
        return
    if routed_experts(folder.config) > 1:
        raise UnsupportedModel(
            f"{folder.architecture} computes its experts in its own way, not with mlx-lm's "
            "SwitchGLU or SwitchMLP, so they cannot be streamed; and they are too large to be "
            "loaded whole, which is why this engine exists."
        )
    raise UnsupportedModel(
        f"{folder.architecture} has no routed experts: every weight is used for every token, so "
        "there is nothing to stream. Run it with mlx-lm instead.",
        Remedy.USE_LLM_MLX,
    )


def _refuse_whole_experts(folder: Folder, model: nn.Module, switches: dict[str, nn.Module]) -> None:
    """No stack of routed experts may stay behind and be loaded whole without a word."""
    counts = {expert_count(switch) for switch in switches.values()}
    inside = tuple(f"{path}." for path in switches)
    for name, array in parameters(model).items():
        if (
            "expert" in name
            and array.ndim >= 3
            and array.shape[0] in counts
            and not name.startswith(inside)
        ):
            raise UnsupportedModel(
                f"{folder.architecture}: {name} looks like a stack of experts outside of the "
                "layers that can be streamed; loading it whole could fill the memory."
            )
