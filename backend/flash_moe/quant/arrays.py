"""Named arrays and a few words about them as one file: whole and as written, or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash_moe.checkpoint.atomic import replacing
from flash_moe.checkpoint.headers import read_header
from flash_moe.prefix import record
from flash_moe.prefix.record import CHECKSUM, Damaged, Part

Array = NDArray[Any]
Arrays = Mapping[str, Array]
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_arrays(path: Path, about: dict[str, Any], arrays: Arrays) -> None:
    """Arrays that lie in files themselves are never in memory as a whole."""
    parts = {name: _part(array) for name, array in arrays.items()}
    head = record.header({"about": json.dumps(about)}, parts)
    with replacing(path) as temporary, temporary.open("wb") as file:
        record.write(file, head, parts)


def open_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Arrays that are read where they are used, once all bytes are known to be as written.

    Damaged or CheckpointError if they are not, OSError if there is no such file.
    """
    path.open("rb").close()
    for _ in record.read_parts(path):
        pass
    try:
        about = json.loads(record.read_metadata(path)["about"])
        tensors = [tensor for name, tensor in read_header(path).items() if name != CHECKSUM]
        arrays = {t.name: _mapped(path, _DTYPES[t.dtype], t.offset, t.shape) for t in tensors}
    except (LookupError, ValueError, RecursionError) as error:
        raise Damaged(f"it lacks {error}") from error
    return about, arrays


def _part(array: Array) -> Part:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Part(_NAMES[array.dtype.name], array.shape, raw.data)


def _mapped(path: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> Array:
    # Nothing cannot be mapped.
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape)
