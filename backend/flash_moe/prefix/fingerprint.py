"""Whose states these are: all that changes a model's logits, in one hash.

A state that was kept by other weights, another K, runtime, version or machine is not wrong by much,
but it is not the one that this process would compute; so it is never found.
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
from flash_moe.machine import inspect_machine
from flash_moe.model.load import StreamedModel

# Of every weight file: times and sizes are all alike where files come from an image or an archive,
# but a model that was trained further has other bytes everywhere.
SAMPLE = 1 << 16
CODE = (".py", ".c", ".h", ".metal")


def fingerprint(model: StreamedModel) -> str:
    digest = hashlib.sha256()
    for text in (*_model(model), *_machine(), *_environment()):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    for path in _code():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def described(model: StreamedModel) -> dict[str, Any]:
    """The same for people."""
    return {
        "path": str(model.path),
        "experts_per_token": model.plan.experts_per_token,
        "bits": model.plan.bits,
        "runtime": model.runtime.name,
    }


def _model(model: StreamedModel) -> list[str]:
    plan, runtime = model.plan, model.runtime
    found = [
        str(plan.experts_per_token),
        str(plan.choice),
        plan.bits,
        runtime.name,
        runtime.why,
        str(runtime.widen),
    ]
    for name in ("config.json", MANIFEST):
        path = model.path / name
        found.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none")
    for path in sorted(model.path.iterdir()):
        if path.suffix in (".safetensors", ".experts"):
            about = path.stat()
            found += [path.name, str(about.st_size), str(about.st_mtime_ns), _sample(path)]
    return found


def _sample(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(SAMPLE)
        file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLE))
        return hashlib.sha256(first + file.read()).hexdigest()


def _machine() -> list[str]:
    """Libraries choose their arithmetic by processor."""
    return [platform.system(), platform.machine(), inspect_machine().cpu, str(mx.default_device())]


def _environment() -> list[str]:
    # MLX_ENABLE_TF32 changes results, and others may.
    settings = sorted(item for item in os.environ.items() if item[0].startswith("MLX_"))
    return [*(f"{name}={value}" for name, value in settings), version("mlx"), version("mlx-lm")]


def _code() -> list[Path]:
    """Our own: a checkout changes without a new version."""
    places = {Path(flash_moe.__file__).parent, shaders.folder()}
    found = {path for place in places for path in place.rglob("*") if path.suffix in CODE}
    return sorted(found)
