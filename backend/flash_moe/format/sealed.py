"""A sealed file: named arrays as safetensors, so that any tool can look inside, and a checksum.

Nobody trusts the file: its header is proven to cover it exactly, and all bytes are summed before
what they say is used. CRC-32 finds every single flipped bit and every torn page but one in 4e9, at
6 GB/s on a Zen 5 core, where SHA-256 reads 1.8.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from flash_moe.format.safetensors import make_header, read_header

CHECKSUM = "checksum"


class SealedArray(NamedTuple):
    """Its dtype as safetensors calls it, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Damaged(Exception):
    """The file is not what was written."""


def header(metadata: Mapping[str, str], arrays: Mapping[str, SealedArray]) -> bytes:
    sizes = [(name, array.dtype, array.shape, array.data.nbytes) for name, array in arrays.items()]
    return make_header([*sizes, (CHECKSUM, "U32", (1,), 4)], metadata)


def file_bytes(head: bytes, arrays: Mapping[str, SealedArray]) -> int:
    return len(head) + sum(array.data.nbytes for array in arrays.values()) + 4


def write(file: BinaryIO, head: bytes, arrays: Mapping[str, SealedArray]) -> None:
    """Everything, synced to the disk."""
    checksum = zlib.crc32(head)
    file.write(head)
    for array in arrays.values():
        checksum = zlib.crc32(array.data, checksum)
        file.write(array.data)
    file.write(checksum.to_bytes(4, "little"))
    file.flush()
    os.fsync(file.fileno())


def read_metadata(path: Path) -> dict[str, str]:
    """Empty for a file that is not ours; OSError if it is gone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length < os.fstat(file.fileno()).st_size else b""
    try:
        metadata = json.loads(raw)["__metadata__"]
        return {str(name): str(text) for name, text in metadata.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def read_arrays(path: Path) -> Iterator[tuple[str, SealedArray]]:
    """One by one, so that no second copy of all is needed. Damaged at the end, if they are not
    what was written: use nothing before that. CheckpointError means the same."""
    tensors = sorted(read_header(path).values(), key=lambda tensor: tensor.offset)
    if not tensors or tensors[-1].name != CHECKSUM or tensors[-1].nbytes != 4:
        raise Damaged("it has no checksum")
    with path.open("rb", buffering=0) as file:
        checksum = zlib.crc32(_read(file, tensors[0].offset))
        for tensor in tensors[:-1]:
            data = _read(file, tensor.nbytes)
            checksum = zlib.crc32(data, checksum)
            yield tensor.name, SealedArray(tensor.dtype, tensor.shape, data)
        if _read(file, 4).tobytes() != checksum.to_bytes(4, "little"):
            raise Damaged("its bytes are not those that were written")


def _read(file: Any, count: int) -> memoryview:
    # Not a bytearray, which would be filled with zeros first.
    data, done = np.empty(count, np.uint8).data, 0
    # One read gives 2 GB at most.
    while done < count:
        got = file.readinto(data[done:])
        if not got:
            raise Damaged("it ends too soon")
        done += got
    return data
