"""The tensors of a synthetic checkpoint: their names and types from mlx-lm's model, random bytes
for the matrices, written shard by shard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe import upstream
from flash_moe.arrays import dtype_name, mlx_dtype, raw_bytes
from flash_moe.callbacks import Advance
from flash_moe.checkpoint.switches import parameters
from flash_moe.errors import OptionError
from flash_moe.format.dtypes import BY_NAME
from flash_moe.format.safetensors import make_header
from flash_moe.synth.tokenizer import make_tokenizer

# Random bytes are drawn once and written again from other starts, so that the disk is the limit:
# drawing 30 GB anew takes longer than writing them. Prime, so that no two experts get the same.
POOL_BYTES = 67_108_859
FILE_BYTES = 4 << 30
# Real log-odds are peaked; with the variance that 1/sqrt(n) gives, every token is about as likely.
HEAD_GAIN = 4.0
ROUTERS = ("gate", "shared_expert_gate")
ROUTER_QUANTIZATION = {"group_size": 64, "bits": 8}


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor to be written: random bytes, or the array that mlx-lm initialises it with."""

    name: str
    array: mx.array
    random: bool


def make_weights(
    config: dict[str, Any], bits: int, group_size: int, dtype: str, seed: int
) -> list[Weight]:
    """All tensors of the quantized model, still lazy; OptionError if it cannot be built."""
    model = _quantized_model(config, bits, group_size, dtype, seed)
    matrices = {path: module for path, module in model.named_modules() if hasattr(module, "bits")}
    weights = []
    for name, array in parameters(model).items():
        owner, _, param = name.rpartition(".")
        matrix = matrices.get(owner)
        if matrix is not None and param != "weight":
            array = _centred(matrix, param, array, owner)
        weights.append(Weight(name, array, random=matrix is not None and param == "weight"))
    return weights


def write_weights(
    folder: Path, weights: list[Weight], seed: int, sparse: bool, progress: Advance
) -> None:
    pool = np.random.Generator(np.random.SFC64(seed)).bytes(POOL_BYTES)
    shards = list(_shards(weights))
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(path, shard, pool, seed + number, sparse, progress)


def router_quantization(layers: str, count: int) -> dict[str, dict[str, int]]:
    """What config.json says about the matrices that are not quantized like all others."""
    return {
        f"{layers}.{layer}.mlp.{name}": dict(ROUTER_QUANTIZATION)
        for layer in range(count)
        for name in ROUTERS
    }


def _quantized_model(
    config: dict[str, Any], bits: int, group_size: int, dtype: str, seed: int
) -> nn.Module:
    module = "mlx_lm.models.qwen3_5_moe"
    model_class, arguments = upstream.get(module, "Model"), upstream.get(module, "ModelArgs")
    mx.random.seed(seed)
    try:
        model: nn.Module = model_class(arguments.from_dict(config))
        model.set_dtype(mlx_dtype(dtype))
        nn.quantize(model, group_size, bits, class_predicate=_quantization_of)
    except ValueError as error:
        raise OptionError(f"This shape cannot be built: {error}. Choose another.") from error
    return model


def _quantization_of(path: str, module: nn.Module) -> bool | dict[str, int]:
    if not hasattr(module, "to_quantized"):
        return False
    if path.endswith(("mlp.gate", "shared_expert_gate")):
        return ROUTER_QUANTIZATION
    return True


def _centred(matrix: nn.Module, param: str, like: mx.array, owner: str) -> mx.array:
    """Scales and biases that make uniform codes a weight of mean 0 and variance 1/inputs."""
    inputs = like.shape[-1] * matrix.group_size
    levels = 2**matrix.bits
    scale = 1 / np.sqrt(inputs * (levels**2 - 1) / 12)
    if owner.endswith("lm_head"):
        scale *= HEAD_GAIN
    value = scale if param == "scales" else -scale * (levels - 1) / 2
    return mx.full(like.shape, value, like.dtype)


def _shards(weights: list[Weight]) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    size = 0
    for weight in weights:
        if shard and size + weight.array.nbytes > FILE_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += weight.array.nbytes
    yield shard


def _write_shard(
    path: Path, shard: list[Weight], pool: bytes, seed: int, sparse: bool, progress: Advance
) -> None:
    header = make_header(
        [(w.name, _safetensors_dtype(w.array), w.array.shape, w.array.nbytes) for w in shard],
        {"format": "mlx"},
        alignment=8,
    )
    starts = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb") as file:
        file.write(header)
        if sparse:
            file.truncate(len(header) + sum(weight.array.nbytes for weight in shard))
            return
        for weight in shard:
            for piece in _data_of(weight, pool, starts):
                file.write(piece)
                progress(len(piece))
        file.flush()
        os.fsync(file.fileno())


def _safetensors_dtype(array: mx.array) -> str:
    return BY_NAME[dtype_name(array.dtype)].safetensors


def _data_of(weight: Weight, pool: bytes, starts: np.random.Generator) -> Iterator[memoryview]:
    if weight.random:
        yield from _random_pieces(memoryview(pool), weight.array.nbytes, starts)
        return
    array = weight.array
    if weight.name.endswith(("lm_head.scales", "lm_head.biases")):
        array = _only_words(array)
    yield raw_bytes(mx.contiguous(array).reshape(-1).view(mx.uint8))


def _random_pieces(
    pool: memoryview, length: int, starts: np.random.Generator
) -> Iterator[memoryview]:
    while length:
        start = int(starts.integers(0, len(pool) // 2))
        piece = pool[start : start + min(length, len(pool) - start)]
        length -= len(piece)
        yield piece


def _only_words(array: mx.array) -> mx.array:
    """No logit for ids that are not readable text: noise, but in words, and no early end."""
    ids = np.zeros(array.shape[0], dtype=bool)
    ids[[token for token in make_tokenizer().readable if token < len(ids)]] = True
    return array * mx.array(ids)[:, None].astype(array.dtype)
