"""The text of the shaders, and kernels made of it: by Metal as it is, by CUDA with its address
spaces taken out and a header of Metal names before it."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

GpuKind = Literal["metal", "cuda"]


def folder() -> Path:
    """Inside the installed package; in a source tree, at its top."""
    installed = Path(str(files("flash_moe"))) / "shaders"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "shaders"


def text(name: str) -> str:
    return (folder() / name).read_text("utf-8")


def on_cuda(source: str) -> str:
    bare = re.sub(r"\b(device|constant|thread)\b ?", "", source)
    return re.sub(r"\binline\b", "__device__ __forceinline__", bare)


@cache
def kernel(kind: GpuKind, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    """A callable of mlx.core.fast; it compiles at its first call for each choice of constants."""
    header, source = text("moe_common.h"), text(f"{name}.metal")
    make: Any = mx.fast.metal_kernel
    if kind == "cuda":
        make = mx.fast.cuda_kernel
        header, source = text("metal_on_cuda.h") + on_cuda(header), on_cuda(source)
    return make(name, list(inputs), list(outputs), source, header)
