"""The one table of number types: their names in safetensors, in MLX and numpy, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """`name` is MLX's; None where MLX has no such type. numpy has all of MLX's but bfloat16."""

    safetensors: str
    bits: int
    name: str | None = None

    @property
    def nbytes(self) -> int:
        return self.bits // 8

    @property
    def numpy(self) -> np.dtype[Any]:
        """bfloat16 as its bits."""
        return np.dtype("uint16" if self.name == "bfloat16" else self.name)


_TABLE = (
    Dtype("BOOL", 8, "bool"),
    Dtype("U8", 8, "uint8"),
    Dtype("I8", 8, "int8"),
    Dtype("F8_E4M3", 8),
    Dtype("F8_E5M2", 8),
    Dtype("F8_E8M0", 8),
    Dtype("U16", 16, "uint16"),
    Dtype("I16", 16, "int16"),
    Dtype("F16", 16, "float16"),
    Dtype("BF16", 16, "bfloat16"),
    Dtype("U32", 32, "uint32"),
    Dtype("I32", 32, "int32"),
    Dtype("F32", 32, "float32"),
    Dtype("U64", 64, "uint64"),
    Dtype("I64", 64, "int64"),
    Dtype("F64", 64, "float64"),
    Dtype("C64", 64, "complex64"),
)
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _TABLE}
BY_NAME = {dtype.name: dtype for dtype in _TABLE if dtype.name}

FLOATS = ("bfloat16", "float16", "float32")
