"""Named arrays and a few words about them as one file: whole and as written, or not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash_moe.format import sealed as record
from flash_moe.format.atomic import replacing
from flash_moe.format.safetensors import Tensor, read_header
from flash_moe.format.sealed import CHECKSUM, Damaged, Part

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
    """Arrays are asked for twice, one after the other: `arrays` may read each when it is."""
    parts = _Parts(arrays)
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
    # One map for all of them: each holds a file open, and there are thousands of arrays.
    whole = np.asarray(np.memmap(path, np.uint8, "r"))
    tensors = [tensor for name, tensor in read_header(path).items() if name != CHECKSUM]
    try:
        about = json.loads(record.read_metadata(path)["about"])
        return about, {tensor.name: _inside(whole, tensor) for tensor in tensors}
    except (LookupError, ValueError, RecursionError) as error:
        raise Damaged(f"it lacks {error}") from error


class _Parts(Mapping[str, Part]):
    """Made when they are asked for, so that there is one at a time."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> Part:
        array = self._arrays[name]
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return Part(_NAMES[array.dtype.name], array.shape, raw.data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _inside(whole: Array, tensor: Tensor) -> Array:
    raw = whole[tensor.offset : tensor.offset + tensor.nbytes]
    found: Array = raw.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
    return found
