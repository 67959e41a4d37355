"""One hash over everything that changes a model's logits: it says whose states these are.

A state saved with other weights, another K, runtime, version or machine would be close, but not
equal to the one that this process computes, so it is never used.
"""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import flash_moe
from flash_moe.format.manifest import MANIFEST
from flash_moe.kernels import shaders
from flash_moe.machine import cpu_name
from flash_moe.model.load import StreamedModel

# Bytes hashed at each end of a weight file. Times and sizes alone are not enough: files from an
# image or archive may share them, but further training changes bytes everywhere.
SAMPLE = 1 << 16
CODE = (".py", ".c", ".h", ".metal")


def fingerprint(model: StreamedModel) -> str:
    digest = hashlib.sha256()
    for text in (*_model(model), *_machine(), *_environment()):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    for path in _code():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe(model: StreamedModel) -> dict[str, Any]:
    """The same model, for people."""
    return {
        "path": str(model.path),
        "experts_per_token": model.plan.experts_per_token,
        "bits": model.plan.bits,
        "runtime": model.runtime.name,
    }


def _model(model: StreamedModel) -> list[str]:
    plan, runtime = model.plan, model.runtime
    parts = [
        str(plan.experts_per_token),
        str(model.choice),
        plan.bits,
        runtime.name,
        runtime.why,
        str(runtime.widen),
    ]
    for name in ("config.json", MANIFEST):
        path = model.path / name
        parts.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none")
    for path in sorted(model.path.iterdir()):
        if path.suffix in (".safetensors", ".experts"):
            status = path.stat()
            parts += [path.name, str(status.st_size), str(status.st_mtime_ns), _sample(path)]
    return parts


def _sample(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(SAMPLE)
        file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLE))
        return hashlib.sha256(first + file.read()).hexdigest()


def _machine() -> list[str]:
    """Libraries choose their arithmetic to suit the processor."""
    return [platform.system(), platform.machine(), cpu_name(), str(mx.default_device())]


def _environment() -> list[str]:
    # MLX_ENABLE_TF32 changes results, and others may.
    settings = sorted(item for item in os.environ.items() if item[0].startswith("MLX_"))
    return [*(f"{name}={value}" for name, value in settings), version("mlx"), version("mlx-lm")]


def _code() -> list[Path]:
    """Our own source: a checkout changes without a new version number."""
    folders = {Path(flash_moe.__file__).parent, shaders.folder()}
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in CODE}
    return sorted(files)
