"""Checkpoints of random weights: the true Qwen3.5-MoE architecture at any size.

For tests of arithmetic, memory and bandwidth, never of quality: the replies are noise. Weights
are quantized as mlx-lm's converter does it (experts and most matrices at `bits`, routers at 8).
Names, shapes and types come from mlx-lm's own model, so the checkpoint is one that it loads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.checkpoint.switches import parameters
from flash_moe.errors import CheckpointError, NoSpace, OptionError
from flash_moe.format.atomic import sync, write_json
from flash_moe.stream.bank import raw_bytes
from flash_moe.synth.tokenizer import TEMPLATE, make_tokenizer, require_vocabulary

Progress = Callable[[int], None]

# Random bytes are drawn once and written again from other starts, so that the disk is the limit:
# drawing 30 GB anew takes longer than writing them. Prime, so that no two experts get the same.
POOL_BYTES = 67_108_859
FILE_BYTES = 4 << 30
# Real log-odds are peaked; with the variance that 1/sqrt(n) gives, every token is about as likely.
HEAD_GAIN = 4.0


@dataclass(frozen=True, slots=True)
class Shape:
    """`small` is for demos and tests; `397b` has the true widths of Qwen3.5-397B-A17B."""

    layers: int = 8
    experts: int = 64
    experts_per_token: int = 4
    hidden: int = 256
    intermediate: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    linear_heads: int = 4
    linear_key_heads: int = 2
    linear_dim: int = 64
    vocabulary: int = 2048

    def config(self) -> dict[str, Any]:
        """config.json as the vendor nests it."""
        text = {
            "model_type": "qwen3_5_moe_text",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "linear_num_value_heads": self.linear_heads,
            "linear_num_key_heads": self.linear_key_heads,
            "linear_key_head_dim": self.linear_dim,
            "linear_value_head_dim": self.linear_dim,
            "linear_conv_kernel_dim": 4,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "full_attention_interval": 4,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.intermediate,
            "shared_expert_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000.0,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10] if self.head_dim == 256 else [3, 3, 2],
            },
        }
        return {
            "model_type": "qwen3_5_moe",
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "text_config": text,
        }


SHAPES = {
    "small": Shape(),
    "397b": Shape(
        layers=60,
        experts=512,
        experts_per_token=10,
        hidden=4096,
        intermediate=1024,
        heads=32,
        kv_heads=2,
        head_dim=256,
        linear_heads=64,
        linear_key_heads=16,
        linear_dim=128,
        vocabulary=248320,
    ),
}


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor to be written: random bytes, or the array that mlx-lm starts it with."""

    name: str
    array: mx.array
    random: bool


def synthesize(
    target: Path,
    shape: Shape = SHAPES["small"],
    *,
    bits: int = 4,
    group_size: int = 64,
    dtype: str = "float32",
    seed: int = 0,
    sparse: bool = False,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write a checkpoint folder. `sparse` leaves the weights out: headers true, bytes zero."""
    if target.exists():
        raise CheckpointError(f"{target} exists. Choose another name, or remove it first.")
    slots = _slots(shape, bits, group_size, dtype, seed)
    needed = sum(slot.array.nbytes for slot in slots)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed > free and not sparse:
        raise NoSpace(
            f"{needed / 1e9:.1f} GB are needed and {target.parent} has {free / 1e9:.1f} GB free."
        )
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        pool = np.random.Generator(np.random.SFC64(seed)).bytes(POOL_BYTES)
        files = list(_files(slots))
        for number, group in enumerate(files, 1):
            path = work / f"model-{number:05}-of-{len(files):05}.safetensors"
            _write_file(path, group, pool, seed + number, sparse, progress)
        _write_small_files(work, shape, bits, group_size)
        work.rename(target)
        sync(target.parent)
    finally:
        # Nothing to resume: making it again is as quick as going on.
        shutil.rmtree(work, ignore_errors=True)


def nbytes(shape: Shape, *, bits: int = 4, group_size: int = 64, dtype: str = "float32") -> int:
    """What `synthesize` would write."""
    return sum(slot.array.nbytes for slot in _slots(shape, bits, group_size, dtype, 0))


def _slots(shape: Shape, bits: int, group_size: int, dtype: str, seed: int) -> list[_Slot]:
    from mlx_lm.models import qwen3_5_moe

    require_vocabulary(shape.vocabulary)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise OptionError(f"dtype {dtype!r}: choose float32, bfloat16 or float16.")
    mx.random.seed(seed)
    try:
        model = qwen3_5_moe.Model(qwen3_5_moe.ModelArgs.from_dict(shape.config()))
        model.set_dtype(getattr(mx, dtype))
        nn.quantize(model, group_size, bits, class_predicate=_quantized_as)
    except ValueError as error:
        raise OptionError(f"This shape cannot be built: {error}.") from error
    quantized = {path: module for path, module in model.named_modules() if hasattr(module, "bits")}
    slots = []
    for name, array in parameters(model).items():
        owner, _, param = name.rpartition(".")
        module = quantized.get(owner)
        if module is None:
            slots.append(_Slot(name, array, random=False))
        elif param == "weight":
            slots.append(_Slot(name, array, random=True))
        else:
            slots.append(_Slot(name, _centred(module, param, array, owner), random=False))
    return slots


def _quantized_as(path: str, module: nn.Module) -> bool | dict[str, int]:
    if not hasattr(module, "to_quantized"):
        return False
    if path.endswith(("mlp.gate", "shared_expert_gate")):
        return {"group_size": 64, "bits": 8}
    return True


def _centred(module: Any, param: str, like: mx.array, owner: str) -> mx.array:
    """Scales and biases that make uniform codes a weight of mean 0 and variance 1/inputs."""
    inputs = like.shape[-1] * module.group_size
    levels = 2**module.bits
    scale = 1 / np.sqrt(inputs * (levels**2 - 1) / 12)
    if owner.endswith("lm_head"):
        scale *= HEAD_GAIN
    value = scale if param == "scales" else -scale * (levels - 1) / 2
    return mx.full(like.shape, value, like.dtype)


def _files(slots: list[_Slot]) -> Iterator[list[_Slot]]:
    group: list[_Slot] = []
    size = 0
    for slot in slots:
        if group and size + slot.array.nbytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(slot)
        size += slot.array.nbytes
    yield group


_TYPES = {"uint32": "U32", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _write_file(
    path: Path, slots: list[_Slot], pool: bytes, seed: int, sparse: bool, progress: Progress
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for slot in slots:
        kind = _TYPES[str(slot.array.dtype).rpartition(".")[2]]
        end = at + slot.array.nbytes
        header[slot.name] = {
            "dtype": kind,
            "shape": list(slot.array.shape),
            "data_offsets": [at, end],
        }
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    starts = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if sparse:
            file.truncate(8 + len(raw) + at)
            return
        for slot in slots:
            data = _random(pool, slot.array.nbytes, starts) if slot.random else _bytes(slot)
            for piece in data:
                done = 0
                while done < len(piece):
                    done += os.write(file.fileno(), piece[done:])
                progress(len(piece))
        os.fsync(file.fileno())


def _random(pool: bytes, length: int, starts: np.random.Generator) -> Iterator[memoryview]:
    view = memoryview(pool)
    while length:
        start = int(starts.integers(0, len(pool) // 2))
        piece = view[start : start + min(length, len(pool) - start)]
        length -= len(piece)
        yield piece


def _bytes(slot: _Slot) -> Iterator[memoryview]:
    array = slot.array
    if slot.name.endswith(("lm_head.scales", "lm_head.biases")):
        array = _only_words(array)
    yield raw_bytes(mx.contiguous(array).reshape(-1).view(mx.uint8))


def _only_words(array: mx.array) -> mx.array:
    """No logit for ids that are no readable text: noise, but of words, and no early end."""
    ids = np.zeros(array.shape[0], dtype=bool)
    ids[[i for i in make_tokenizer().readable if i < len(ids)]] = True
    return array * mx.array(ids)[:, None].astype(array.dtype)


def _write_small_files(work: Path, shape: Shape, bits: int, group_size: int) -> None:
    config = shape.config()
    overrides: dict[str, Any] = {
        f"language_model.model.layers.{layer}.mlp.{gate}": {"group_size": 64, "bits": 8}
        for layer in range(shape.layers)
        for gate in ("gate", "shared_expert_gate")
    }
    config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine", **overrides}
    made = make_tokenizer()
    write_json(work / "config.json", config)
    write_json(work / "generation_config.json", {"eos_token_id": made.stop_tokens})
    write_json(work / "tokenizer_config.json", made.config)
    (work / "tokenizer.json").write_text(made.json, "utf-8")
    (work / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
