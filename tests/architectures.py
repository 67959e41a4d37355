"""Tiny random models of every architecture, as checkpoints in mlx-lm's or the vendors' form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

from flash_moe.checkpoint.switches import find_switches, parameters
from tests.architecture_configs import CONFIGS


def random_model(
    name: str, *, bits: int | None = None, group_size: int = 32
) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose every parameter is drawn anew, its experts quantized if `bits` says so."""
    config = json.loads(json.dumps(CONFIGS[name]))
    model_class, args_class = _get_classes(config)
    mx.random.seed(7)
    model = model_class(args_class.from_dict(config))
    model.load_weights([(path, _draw(path, p)) for path, p in parameters(model).items()])
    if bits is not None:
        inside = tuple(f"{path}." for path in find_switches(model))
        nn.quantize(
            model,
            group_size,
            bits,
            class_predicate=lambda path, module: (
                path.startswith(inside) and hasattr(module, "to_quantized")
            ),
        )
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    model.eval()
    mx.eval(model.parameters())
    return model, config


def _draw(path: str, like: mx.array) -> mx.array:
    """Random, but as large as a trained model has it: norms near one, matrices by their inputs."""
    if not mx.issubdtype(like.dtype, mx.floating):
        return like
    if like.ndim < 2:
        noise = 0.1 * mx.random.normal(like.shape)
        # A bias starts at zero, a norm at one, a decay where mlx-lm starts it: keep the place.
        return (mx.where(mx.isfinite(like), like, 0) + noise).astype(like.dtype)
    return (mx.random.normal(like.shape) / like.shape[-1] ** 0.5).astype(like.dtype)


def write_checkpoint(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """As mlx-lm's converter leaves it: names and layouts after `sanitize`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), parameters(model))


Weights = dict[str, mx.array]

GATE_UP_DOWN = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# The layouts that vendors publish and mlx-lm's `sanitize` undoes: (of the path of a switch layer,
# what takes its place) and how the projections are called in there.
UNSTACKED: dict[str, tuple[str, str, dict[str, str]]] = {
    **dict.fromkeys(
        (
            "bailing_moe",
            "deepseek",
            "deepseek_v2",
            "deepseek_v3",
            "ernie4_5_moe",
            "exaone_moe",
            "glm4_moe",
            "hunyuan",
            "jamba",
            "olmoe",
            "qwen2_moe",
            "qwen3_moe",
        ),
        ("switch_mlp", "experts", GATE_UP_DOWN),
    ),
    **dict.fromkeys(
        ("minimax", "mixtral", "phimoe", "lfm2_moe"), ("switch_mlp", "experts", NUMBERED)
    ),
    "dots1": ("experts", "experts", GATE_UP_DOWN),
    "nemotron_h": ("switch_mlp", "experts", {"fc1": "up_proj", "fc2": "down_proj"}),
    "phixtral": ("switch_mlp", "mlp", {"fc1": "fc1", "fc2": "fc2"}),
}


def vendor_layout(name: str, weights: Weights) -> Weights:
    """The same weights as vendors lay them out; for the names in UNSTACKED and JOINED."""
    return _unstack(weights, *UNSTACKED[name]) if name in UNSTACKED else JOINED[name](weights)


def _unstack(weights: Weights, switch: str, experts: str, names: dict[str, str]) -> Weights:
    """One tensor an expert: `experts.7.up_proj.weight`."""
    vendor: Weights = {}
    for path, array in weights.items():
        place, _, rest = path.partition(f".{switch}.")
        projection, _, param = rest.partition(".")
        if projection not in names:
            vendor[path] = array
            continue
        for number in range(array.shape[0]):
            # Copies: a slice alone would be saved with its strides.
            row = mx.contiguous(array[number])
            vendor[f"{place}.{experts}.{number}.{names[projection]}.{param}"] = row
    return vendor


def _fused(weights: Weights) -> Weights:
    """Qwen3.5: gate above up in one tensor, and the vendor's prefix."""
    vendor: Weights = {}
    for path, array in weights.items():
        named = path.replace("language_model.model.", "model.language_model.")
        if path.endswith("switch_mlp.gate_proj.weight"):
            up = weights[path.replace("gate_proj", "up_proj")]
            place = named.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj")
            vendor[place] = mx.concatenate([array, up], axis=1)
        elif path.endswith("switch_mlp.down_proj.weight"):
            vendor[named.replace("switch_mlp.down_proj.weight", "experts.down_proj")] = array
        elif not path.endswith("switch_mlp.up_proj.weight"):
            vendor[named] = array
    return vendor


def _granite(weights: Weights) -> Weights:
    """GraniteMoE: `input_linear` is gate above up, `output_linear` is down."""
    vendor: Weights = {}
    for path, array in weights.items():
        if path.endswith("switch_mlp.gate_proj.weight"):
            up = weights[path.replace("gate_proj", "up_proj")]
            place = path.replace("switch_mlp.gate_proj", "input_linear")
            vendor[place] = mx.concatenate([array, up], axis=1)
        elif path.endswith("switch_mlp.down_proj.weight"):
            vendor[path.replace("switch_mlp.down_proj", "output_linear")] = array
        elif not path.endswith("switch_mlp.up_proj.weight"):
            vendor[path] = array
    return vendor


def _interleaved(weights: Weights) -> Weights:
    """gpt-oss: rows of gate and up alternate, and matrices come as mxfp4 blocks and scales."""
    vendor: Weights = {}
    for path, array in weights.items():
        if "experts.gate_proj" in path:
            up = weights[path.replace("gate_proj", "up_proj")]
            both = mx.stack([array, up], axis=2).reshape(array.shape[0], -1, *array.shape[2:])
            _mxfp4(vendor, path.replace("gate_proj", "gate_up_proj"), both)
        elif "experts.down_proj" in path:
            _mxfp4(vendor, path, array)
        elif "experts.up_proj" not in path:
            vendor[path] = array
    return vendor


def _mxfp4(vendor: Weights, path: str, array: mx.array) -> None:
    if path.endswith(".bias"):
        vendor[path.replace(".bias", "_bias")] = array
        return
    weight, scales = mx.quantize(array, 32, 4, mode="mxfp4")
    blocks = weight.view(mx.uint8).reshape(*scales.shape, -1)
    vendor[path.replace(".weight", "_blocks")] = blocks
    vendor[path.replace(".weight", "_scales")] = scales


def _transposed(weights: Weights) -> Weights:
    """Llama 4: inputs before outputs, gate beside up."""
    vendor: Weights = {}
    for path, array in weights.items():
        turned = mx.contiguous(array.swapaxes(1, 2)) if array.ndim == 3 else array
        if path.endswith("experts.gate_proj.weight"):
            up = weights[path.replace("gate_proj", "up_proj")].swapaxes(1, 2)
            place = path.replace("gate_proj.weight", "gate_up_proj")
            vendor[place] = mx.concatenate([turned, up], axis=2)
        elif path.endswith("experts.down_proj.weight"):
            vendor[path.removesuffix(".weight")] = turned
        elif not path.endswith("experts.up_proj.weight"):
            vendor[path] = array
    return vendor


JOINED = {
    "qwen3_5_moe": _fused,
    "granitemoe": _granite,
    "gpt_oss": _interleaved,
    "llama4": _transposed,
}
