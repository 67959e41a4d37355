"""Packs and what they are compared with, for the tests of this folder."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flash_moe.arrays import mlx_dtype
from flash_moe.callbacks import Advance
from flash_moe.format.manifest import read_manifest
from flash_moe.options import Settings
from flash_moe.pack.job import PackJob
from tests.architecture_configs import CONFIGS
from tests.architectures import random_model

EXACT = Settings(runtime="mlx")
PROMPT = mx.array([[7, 300, 12, 45, 500, 9, 81, 33, 256, 18, 99]])
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "intermediate_size_mlp")


class Interrupted(BaseException):
    """As Ctrl-C: nobody catches it by accident."""


def pack(source: Path, target: Path, **options: Any) -> Path:
    PackJob.plan(source, target, **options).write()
    return target


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def stop_after(calls: int) -> Advance:
    """A progress callback that interrupts when it is called once more than that."""
    left = calls

    def progress(amount: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted

    return progress


def interrupt(write: Callable[[Advance], Any], calls: int) -> None:
    with pytest.raises(Interrupted):
        write(stop_after(calls))


def interrupt_in_third_layer(job: PackJob) -> None:
    """Of a transformed pack, which reports every projection of every expert."""
    skeleton = job.skeleton
    first, second, *_ = skeleton.switches
    calls = sum(
        len(skeleton.layout(path).quantization) * skeleton.expert_count(path)
        for path in (first, second)
    )
    interrupt(job.write, calls + 1)


def modified(folder: Path) -> dict[str, int]:
    """When each file of experts was written last."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.experts")}


def as_checkpoint(folder: Path, target: Path) -> Path:
    """A pack as a plain checkpoint with all experts in it, for mlx-lm's own loader."""
    target.mkdir()
    weights = resident_weights(folder)
    for layer in read_manifest(folder).layers:
        for part in layer.layout.parts:
            weights[f"{layer.path}.{part.name}"] = stacked(folder, layer, part)
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def resident_weights(folder: Path) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for shard in folder.glob("model*.safetensors"):
        weights |= mx.load(str(shard))  # type: ignore[arg-type]
    return weights


def stacked(folder: Path, layer: Any, part: Any) -> mx.array:
    """One part of all experts of a layer, from the records."""
    records = np.fromfile(folder / layer.file, np.uint8).reshape(layer.experts, -1)
    raw = np.ascontiguousarray(records[:, part.offset : part.offset + part.nbytes])
    return mx.array(raw).view(mlx_dtype(part.dtype)).reshape(layer.experts, *part.shape)


def wide_model(name: str, dtype: str = "float32") -> tuple[nn.Module, dict[str, Any]]:
    """A model of an architecture, with widths that groups of 64 divide."""
    config = copy.deepcopy(CONFIGS[name])
    for place in (config, config.get("text_config", {})):
        place.update({key: 64 for key in WIDTHS if key in place})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, name, config)
        model, config = random_model(name)
    model.set_dtype(mlx_dtype(dtype))
    return model, config
