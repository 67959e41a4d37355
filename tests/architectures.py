"""Tiny random models of every architecture, as checkpoints in mlx-lm's or the vendors' form."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import _get_classes

from tests.architecture_configs import CONFIGS


def random_model(
    name: str,
    *,
    seed: int = 0,
    bits: int | None = None,
    group_size: int = 32,
    mode: str = "affine",
    **changes: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with every parameter drawn anew, its experts quantized if there are `bits`;
    `changes` are those of its config."""
    config = copy.deepcopy(CONFIGS[name]) | changes
    on_metal = mx.default_device() == mx.gpu and mx.metal.is_available()
    if config["model_type"] == "muse_spark" and not on_metal:
        _replace_metal_kernels()
    # For what a constructor draws by itself, such as the decay of a recurrent layer.
    mx.random.seed(seed)
    # A copy, because some ModelArgs write into the dict that they are made from.
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    embeddings = {path for path, module in model.named_modules() if type(module) is nn.Embedding}
    weights = dict(tree_flatten(model.parameters()))
    keys = mx.random.split(mx.random.key(seed), len(weights))
    for key, (path, like) in zip(keys, list(weights.items()), strict=True):
        weights[path] = _draw(path, like, key, path.removesuffix(".weight") in embeddings)
    model.load_weights(list(weights.items()))
    if bits is not None:
        inside = tuple(
            f"{path}."
            for path, module in model.named_modules()
            if isinstance(module, (SwitchGLU, SwitchMLP))
        )
        nn.quantize(
            model,
            group_size,
            bits,
            mode=mode,
            class_predicate=lambda path, module: (
                path.startswith(inside) and hasattr(module, "to_quantized")
            ),
        )
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": mode}
    model.eval()
    mx.eval(model.parameters())
    return model, config


def _draw(path: str, like: mx.array, key: mx.array, embedding: bool) -> mx.array:
    """Random values of the size that training gives: norms near one, matrices by their inputs."""
    if not mx.issubdtype(like.dtype, mx.floating):
        return like
    noise = mx.random.normal(like.shape, key=key)
    if like.ndim < 2 or path.endswith("A_log"):
        # Around where mlx-lm starts them: a bias at zero, a norm at one, a decay at its own.
        value = mx.where(mx.isfinite(like), like, 0) + 0.1 * noise
    elif embedding:
        # Large enough that tokens still differ when they reach a router.
        value = 0.5 * noise
    else:
        # The last axis holds the inputs, but of a convolution by channel it is of length one.
        inputs = like.shape[-1] if like.shape[-1] > 1 else like.size // like.shape[0]
        value = noise / inputs**0.5
    return value.astype(like.dtype)


def write_checkpoint(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """As mlx-lm's converter leaves it: names and layouts after `sanitize`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


Weights = dict[str, mx.array]
Step = Callable[[Weights], Weights]


def vendor_layout(name: str, weights: Weights) -> Weights:
    """The same weights as vendors lay them out; for the names in UNSTACKED and JOINED."""
    for step in UNSTACKED.get(name) or JOINED[name]:
        weights = step(weights)
    return weights


def renamed(*pairs: tuple[str, str]) -> Step:
    def step(weights: Weights) -> Weights:
        vendor = {}
        for path, array in weights.items():
            for ours, theirs in pairs:
                path = path.replace(ours, theirs)
            vendor[path] = array
        return vendor

    return step


def changed(suffixes: tuple[str, ...], change: Callable[[mx.array], mx.array]) -> Step:
    def step(weights: Weights) -> Weights:
        return {
            # Copies, because strides would be saved as well.
            path: mx.contiguous(change(array)) if path.endswith(suffixes) else array
            for path, array in weights.items()
        }

    return step


def convolutions(suffix: str = "conv1d.weight") -> Step:
    """Channels, inputs, taps; mlx-lm has the taps before the inputs."""
    return changed((suffix,), lambda array: array.moveaxis(1, 2))


def centered(*norms: str) -> Step:
    """Norms around zero. Exact, because ours lie between a half and two."""
    return changed(norms, lambda array: array - 1.0 if array.ndim == 1 else array)


def unstacked(names: dict[str, str], switch: str = "switch_mlp", experts: str = "experts") -> Step:
    """One tensor an expert: `experts.7.up_proj.weight`."""

    def step(weights: Weights) -> Weights:
        vendor: Weights = {}
        for path, array in weights.items():
            place, _, inside = path.partition(f".{switch}.")
            projection, _, param = inside.partition(".")
            if projection not in names:
                vendor[path] = array
                continue
            for number in range(array.shape[0]):
                row = mx.contiguous(array[number])
                vendor[f"{place}.{experts}.{number}.{names[projection]}.{param}"] = row
        return vendor

    return step


def fused(
    gate_up: str = "experts.gate_up_proj",
    down: str = "experts.down_proj",
    switch: str = "switch_mlp",
    inputs_first: bool = False,
) -> Step:
    """Gate above up in one tensor, or beside it where inputs come before outputs."""

    def turned(array: mx.array) -> mx.array:
        return mx.contiguous(array.swapaxes(1, 2)) if inputs_first else array

    def step(weights: Weights) -> Weights:
        vendor: Weights = {}
        for path, array in weights.items():
            if path.endswith(f"{switch}.gate_proj.weight"):
                up = weights[path.replace("gate_proj", "up_proj")]
                both = turned(mx.concatenate([array, up], axis=1))
                vendor[path.replace(f"{switch}.gate_proj.weight", gate_up)] = both
            elif path.endswith(f"{switch}.down_proj.weight"):
                vendor[path.replace(f"{switch}.down_proj.weight", down)] = turned(array)
            elif not path.endswith(f"{switch}.up_proj.weight"):
                vendor[path] = array
        return vendor

    return step


def latent(weights: Weights) -> Weights:
    """One matrix from the latent to keys and values; mlx-lm splits it, and turns the keys' part."""
    vendor: Weights = {}
    for path, array in weights.items():
        if path.endswith(".embed_q.weight"):
            values = weights[path.replace("embed_q", "unembed_out")]
            both = mx.concatenate([array.swapaxes(1, 2), values], axis=1)
            vendor[path.replace("embed_q", "kv_b_proj")] = mx.flatten(both, 0, 1)
        elif not path.endswith(".unembed_out.weight"):
            vendor[path] = array
    return vendor


def interleaved(weights: Weights) -> Weights:
    """gpt-oss: rows of gate and up alternate, and matrices come as mxfp4 blocks and scales.

    Exact if the experts have that mode already, otherwise they are rounded to it.
    """
    vendor: Weights = {}
    for path, array in weights.items():
        if ".experts.gate_proj." in path:
            up = weights[path.replace("gate_proj", "up_proj")]
            both = mx.stack([array, up], axis=2).reshape(array.shape[0], -1, *array.shape[2:])
            _mxfp4(vendor, path.replace("gate_proj", "gate_up_proj"), both)
        elif ".experts.down_proj." in path:
            _mxfp4(vendor, path, array)
        elif ".experts.up_proj." not in path:
            vendor[path] = array
    return vendor


def _mxfp4(vendor: Weights, path: str, array: mx.array) -> None:
    place, _, param = path.rpartition(".")
    if param != "weight":
        vendor[f"{place}_{param}"] = array
        return
    if array.dtype != mx.uint32:
        array, vendor[f"{place}_scales"] = mx.quantize(array, 32, 4, mode="mxfp4")
    # 32 numbers of 4 bits are 16 bytes.
    vendor[f"{place}_blocks"] = mx.unflatten(array.view(mx.uint8), -1, (-1, 16))


GATE_UP_DOWN = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
plain, numbered = unstacked(GATE_UP_DOWN), unstacked(NUMBERED)
under_experts = unstacked(GATE_UP_DOWN, switch="experts")
bailing_gate = renamed((".mlp.gate.gate_proj.", ".mlp.gate."))
text_inside = renamed(("language_model.model.", "model.language_model."))
qwen_norms = centered(
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
kimi_names = renamed(
    *((f".mlp.{part}", f".block_sparse_moe.{part}") for part in ("experts.", "shared", "gate.")),
    (".mlp.routed_expert_", ".block_sparse_moe.routed_expert_"),
    (".mlp.e_score", ".block_sparse_moe.gate.e_score"),
    *((f".{part}_conv.conv.", f".{part}_conv1d.") for part in "qkv"),
)
# The steps from mlx-lm's form to the vendors', which mlx-lm's `sanitize` undoes: first where every
# expert has its own tensors, then where all experts share one.
UNSTACKED: dict[str, tuple[Step, ...]] = {
    **dict.fromkeys(("Klear", "afmoe", "dots1"), (under_experts,)),
    **dict.fromkeys(
        (
            *("deepseek", "deepseek_v2", "ernie4_5_moe", "glm4_moe", "hunyuan", "mellum"),
            *("mimo_v2_flash", "olmoe", "qwen2_moe", "qwen3_moe", "solar_open"),
        ),
        (plain,),
    ),
    **dict.fromkeys(
        (
            *("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "joyai_llm_flash"),
            *("kimi_k2", "kimi_k25", "longcat_flash"),
        ),
        (plain, latent),
    ),
    **dict.fromkeys(("minimax", "minimax_m2", "minimax_m3_vl", "mixtral", "phimoe"), (numbered,)),
    **dict.fromkeys(("bailing_moe", "bailing_moe_linear"), (plain, bailing_gate)),
    "bailing_hybrid": (plain, bailing_gate, latent),
    "bailing_moe_v3": (plain, latent, convolutions()),
    "deepseek_v41": (
        unstacked(NUMBERED, switch="experts.switch_mlp"),
        changed((".o_a_proj.weight",), lambda array: mx.flatten(array, 0, 1)),
        renamed(
            ("lm_head.", "head."),
            ("model.embed_tokens.", "embed."),
            ("model.", ""),
            (".input_layernorm.", ".attn_norm."),
            (".post_attention_layernorm.", ".ffn_norm."),
            (".attn_hc.", ".hc_attn_"),
            (".ffn_hc.", ".hc_ffn_"),
            (".self_attn.", ".attn."),
            (".sinks", ".attn_sink"),
            (".mlp.gate.e_score_correction_bias", ".ffn.gate.bias"),
            *(
                (f".shared_experts.{ours}.", f".shared_experts.{w}.")
                for ours, w in NUMBERED.items()
            ),
            (".mlp.", ".ffn."),
            (".q_a_proj.", ".wq_a."),
            (".q_b_proj.", ".wq_b."),
            (".kv_proj.", ".wkv."),
            (".gate_proj.", ".wgate."),
            (".o_a_proj.", ".wo_a."),
            (".o_b_proj.", ".wo_b."),
            (".q_a_norm.", ".q_norm."),
            (".compressor.kv_norm.", ".compressor.norm."),
            (".indexer.k_proj.", ".indexer.wk."),
        ),
    ),
    "exaone_moe": (plain, renamed((".mlp.gate.e_score", ".mlp.e_score"))),
    "jamba": (plain, convolutions()),
    "kimi_k3": (numbered, kimi_names, latent),
    "kimi_linear": (numbered, convolutions("_conv.conv.weight"), kimi_names, latent),
    "laguna": (
        plain,
        renamed((".gate.proj.", ".gate."), (".mlp.gate.e_score", ".mlp.experts.e_score")),
    ),
    "lfm2_moe": (
        numbered,
        convolutions("conv.conv.weight"),
        renamed(*((f".{ours}.", f".{theirs}.") for ours, theirs in NUMBERED.items())),
    ),
    "longcat_flash_ngram": (
        plain,
        latent,
        renamed((".ngram_embeddings.word_embeddings.", ".embed_tokens.")),
    ),
    "nemotron_h": (unstacked({"fc1": "up_proj", "fc2": "down_proj"}), convolutions()),
    "phixtral": (unstacked({"fc1": "fc1", "fc2": "fc2"}, experts="mlp"),),
    "qwen3_next": (plain, convolutions(), qwen_norms),
}
UNSTACKED["nemotron_h+latent"] = UNSTACKED["nemotron_h"]
JOINED: dict[str, tuple[Step, ...]] = {
    "gemma4_text": (fused(switch="experts.switch_glu"), text_inside),
    "gpt_oss": (interleaved,),
    "granitemoe": (fused("input_linear.weight", "output_linear.weight"),),
    "granitemoehybrid": (fused("input_linear.weight", "output_linear.weight"), convolutions()),
    "llama4": (fused(switch="experts", inputs_first=True),),
    "mistral3": (fused(), latent, text_inside),
    "mistral4": (fused(), latent),
    "qwen3_5_moe": (
        fused(),
        convolutions(),
        qwen_norms,
        text_inside,
        renamed(("language_model.lm_head.", "lm_head.")),
    ),
    "qwen3_vl_moe": (
        fused(inputs_first=True),
        text_inside,
        renamed(("language_model.lm_head.", "lm_head.")),
    ),
    "step3p5": (
        centered("norm.weight"),
        renamed(
            (".mlp.switch_mlp.", ".moe."),
            (".mlp.gate.gate.", ".moe.gate."),
            (".mlp.gate.router_bias", ".moe.router_bias"),
            (".mlp.share_expert.", ".share_expert."),
        ),
    ),
}


def _replace_metal_kernels() -> None:
    """muse_spark computes most of its layers in Metal kernels; the same in plain operations."""
    from mlx_lm.models import muse_spark

    def unit(x: mx.array, eps: float) -> mx.array:
        return mx.fast.rms_norm(x.astype(mx.float32), None, eps)

    def expert_routing(
        logits: mx.array,
        bias: mx.array,
        *,
        top_k: int,
        multiplier: float,
        score_eps: float,
        route_scale: float,
    ) -> list[mx.array]:
        scores = mx.sigmoid(logits * multiplier)
        ids = mx.argsort(-(scores + bias), axis=-1)[..., :top_k]
        weights = mx.take_along_axis(scores, ids, axis=-1)
        total = weights.sum(axis=-1, keepdims=True) + score_eps
        return [ids.astype(mx.uint32), weights / total * route_scale]

    def post_expert_norm_combine(
        experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
    ) -> mx.array:
        normed = unit(norm_weight * experts, eps)
        return (normed * weights[..., None]).sum(axis=-2).astype(experts.dtype)

    def pre_norm(stream: mx.array, norm: nn.RMSNorm, *, dtype: mx.Dtype) -> mx.array:
        return (unit(stream, norm.eps) * norm.weight).astype(dtype)

    def norm_add_norm(
        branch: mx.array,
        stream: mx.array,
        *,
        alpha: mx.array,
        beta: mx.array,
        post_weight: mx.array | None,
        post_eps: float,
        next_norm: nn.RMSNorm | None,
    ) -> tuple[mx.array, mx.array | None]:
        scaled = branch if post_weight is None else post_weight * branch
        new = alpha * stream + beta * unit(scaled, post_eps)
        return new, next_norm and pre_norm(new, next_norm, dtype=branch.dtype)

    def qk_norm(
        qkvg: mx.array,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        eps: float,
        query_scale: float,
    ) -> list[mx.array]:
        heads = qkvg[..., : (n_heads + n_kv_heads) * head_dim]
        normed = unit(mx.unflatten(heads, -1, (-1, head_dim)), eps).astype(qkvg.dtype)
        return [normed[..., :n_heads, :] * query_scale, normed[..., n_heads:, :]]

    def qk_norm_rope(
        qkvg: mx.array, *, rope_base: float, offset: int | mx.array, **how: Any
    ) -> list[mx.array]:
        rotary = nn.RoPE(how["head_dim"], traditional=True, base=rope_base)
        both = (part.swapaxes(1, 2) for part in qk_norm(qkvg, **how))
        return [rotary(part, offset=offset).swapaxes(1, 2) for part in both]

    def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
        normed = mx.flatten(unit(x, eps).swapaxes(1, 2), 2, 3)
        return (normed * mx.sigmoid(gate.astype(mx.float32))).astype(x.dtype)

    for kernel in (
        *(expert_routing, post_expert_norm_combine, pre_norm, norm_add_norm),
        *(qk_norm, qk_norm_rope, rms_norm_sigmoid_gate),
    ):
        setattr(muse_spark, kernel.__name__, kernel)
