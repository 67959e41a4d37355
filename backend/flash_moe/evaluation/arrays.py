"""Named numpy arrays, and JSON about them, as one file that is complete or not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash_moe.format import sealed
from flash_moe.format.atomic import replacing
from flash_moe.format.dtypes import BY_NAME, BY_SAFETENSORS
from flash_moe.format.safetensors import Tensor, read_header
from flash_moe.format.sealed import CHECKSUM, Damaged, SealedArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]


def write_arrays(path: Path, about: dict[str, Any], arrays: Arrays) -> None:
    """Each array is asked for twice and only one is held at a time, so `arrays` may be lazy."""
    parts = _Parts(arrays)
    head = sealed.header({"about": json.dumps(about)}, parts)
    with replacing(path) as temporary, temporary.open("wb") as file:
        sealed.write(file, head, parts)


def open_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Arrays that are read from the file when they are used, after its checksum was verified.

    Damaged or CheckpointError if the file is not what was written, OSError if there is none.
    """
    path.open("rb").close()
    for _ in sealed.read_arrays(path):
        pass
    # One map for all: each map holds a file open, and there are thousands of arrays.
    raw = np.asarray(np.memmap(path, np.uint8, "r"))
    tensors = [tensor for name, tensor in read_header(path).items() if name != CHECKSUM]
    try:
        about = json.loads(sealed.read_metadata(path)["about"])
        return about, {tensor.name: _array(raw, tensor) for tensor in tensors}
    except (LookupError, ValueError, RecursionError) as error:
        raise Damaged(f"it lacks {error}") from error


class _Parts(Mapping[str, SealedArray]):
    """Converted when they are asked for, so that there is one at a time."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> SealedArray:
        array = self._arrays[name]
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return SealedArray(BY_NAME[array.dtype.name].safetensors, array.shape, raw.data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _array(raw: Array, tensor: Tensor) -> Array:
    data = raw[tensor.offset : tensor.offset + tensor.nbytes]
    array: Array = data.view(BY_SAFETENSORS[tensor.dtype].numpy).reshape(tensor.shape)
    return array
