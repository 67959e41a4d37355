"""MLX's arrays as memory and as numpy's, without copies, and their types by name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU."""
    return bool(mx.default_device() == mx.gpu) and not mx.metal.is_available()


def mlx_dtype(name: str) -> mx.Dtype:
    """The type that format.dtypes calls `name`."""
    found: mx.Dtype = getattr(mx, "bool_" if name == "bool" else name)
    return found


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def numpy_view(array: mx.array) -> Any:
    """The array's own memory. numpy has no bfloat16 and gets its bits, as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def float32_view(array: mx.array) -> Any:
    """In float32: the array's own memory where it is in float32 already."""
    return np.array(array.astype(mx.float32), copy=False)


def raw_bytes(array: mx.array) -> memoryview:
    """The array's own memory, writable. Not every version's stubs know that it can be viewed."""
    exported: Any = array
    return memoryview(exported)


def address_of(array: mx.array) -> int:
    return int(np.array(array, copy=False).ctypes.data)
