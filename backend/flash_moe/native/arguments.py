"""What C is given: arrays are checked here, so that no call can leave them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def require_array(
    name: str, a: npt.NDArray[Any], dtype: Any, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """`a`, if it is what C will take it for; -1 in `shape` is any length."""
    if not isinstance(a, np.ndarray) or a.dtype != dtype:
        raise ValueError(f"{name} is {getattr(a, 'dtype', type(a))}, not {np.dtype(dtype)}")
    fits = len(shape) == a.ndim and all(n in (-1, m) for n, m in zip(shape, a.shape, strict=True))
    if not fits:
        raise ValueError(f"{name} has shape {list(a.shape)}, not {list(shape)}")
    return a if a.flags.c_contiguous else np.ascontiguousarray(a)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
