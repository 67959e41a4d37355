"""The text of the shaders, and kernels made of it: by Metal as it is, by CUDA with its address
spaces taken out and a header of Metal names before it."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from flash_moe.kernels.cuda_build import CudaKernel

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
    """A callable like those of mlx.core.fast; it compiles at its first call for each choice of
    constants."""
    header, source = text("moe_common.h"), text(f"{name}.metal")
    if kind == "cuda":
        header = text("metal_on_cuda.h") + on_cuda(header)
        return CudaKernel(name, inputs, outputs, header, on_cuda(source))
    make: Any = mx.fast.metal_kernel
    return make(name, list(inputs), list(outputs), source, header)
