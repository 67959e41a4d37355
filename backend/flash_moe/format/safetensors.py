"""Headers of safetensors files: written, and read from files that nobody should trust.

Owns the proof that a header describes its file exactly: every tensor's size follows from its
dtype and shape, and the tensors cover the data with no gap and no overlap. Only what has passed
is given to MLX, whose own reader checks less. No weight is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from flash_moe.errors import CheckpointError
from flash_moe.format.dtypes import BY_SAFETENSORS

# The format's own cap. The 397B checkpoint's largest header is under 1 MB; un-fused ones reach 30.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
# MLX shapes are 32-bit; its reader cuts longer axes down without a word.
MAX_AXIS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor on disk; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str] | None = None,
    alignment: int = 1,
) -> bytes:
    """What stands before the data, its own length first. `tensors` are (name, dtype, shape,
    bytes), in the order of the data."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        offsets = [offset, offset := offset + nbytes]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % alignment)
    return len(raw).to_bytes(8, "little") + raw


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, or CheckpointError."""
    try:
        if not path.is_file():
            raise _broken(path, "it is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _broken(path, f"its header claims {length} bytes of a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    if len(raw) != length:
        raise _broken(path, "it ends inside its header")
    tensors = [
        _tensor(path, name, entry, 8 + length)
        for name, entry in _parse(path, raw).items()
        if name != "__metadata__"
    ]
    _check_coverage(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def read_headers(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of several files; a name may occur once."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise _broken(path, f"{name!r} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    return tensors


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        "".join(found).encode()  # half a surrogate pair is a ValueError too
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    if not _is_metadata(header.get("__metadata__")):
        raise _broken(path, "its __metadata__ is not a table of texts")
    return header


def _is_metadata(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    )


def _tensor(path: Path, name: str, entry: object, data_start: int) -> Tensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _broken(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise _broken(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_AXIS:
        raise _broken(path, f"tensor {name!r} has the impossible shape {shape!r:.80}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"tensor {name!r} has the impossible offsets {offsets!r:.80}")
    nbytes = offsets[1] - offsets[0]
    if prod(shape) * BY_SAFETENSORS[dtype].bits != nbytes * 8:
        raise _broken(path, f"tensor {name!r}: {dtype} {shape!r:.80} does not fill {nbytes} bytes")
    return Tensor(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_coverage(path: Path, tensors: list[Tensor], start: int, size: int) -> None:
    expected = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != expected:
            raise _broken(path, f"tensor {tensor.name!r} leaves a gap or overlaps its neighbour")
        expected += tensor.nbytes
    if expected != size:
        raise _broken(path, f"its tensors end at byte {expected}, the file at {size}")


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound safetensors file: {why}. Download or copy it again."
    )
