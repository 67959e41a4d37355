"""How one expert lies in memory and in a pack: the parts of a record and their places.

A record holds, for each projection in order, its weight, scales, biases and what else mlx-lm's
module has, one after the other. Everything here is plain numbers, so that a manifest can carry it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from flash_moe.errors import CheckpointError

# A page on Apple Silicon, and a multiple of any disk's block: records start on it, so that direct
# I/O and the page cache see whole pages. The 397B records need no padding at all for it.
RECORD_ALIGNMENT = 16384
# A cache line; kernels may load 16-byte vectors from the start of any part.
PART_ALIGNMENT = 64

DTYPE_BYTES = {
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
}


def align(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True, slots=True)
class Quantization:
    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True, slots=True)
class Part:
    """One array of one projection of one expert, `offset` bytes into the record."""

    projection: str
    param: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def name(self) -> str:
        return f"{self.projection}.{self.param}"


@dataclass(frozen=True, slots=True)
class Layout:
    """A record: its parts, and how each projection is quantized (None: not at all)."""

    parts: tuple[Part, ...]
    quantization: tuple[tuple[str, Quantization | None], ...]

    @property
    def nbytes(self) -> int:
        last = self.parts[-1]
        return last.offset + last.nbytes

    @property
    def stride(self) -> int:
        """Distance between records in a pack, and between slots in the bank."""
        return align(self.nbytes, RECORD_ALIGNMENT)

    @property
    def bits(self) -> str:
        """For people: '4-bit', 'mxfp4', '2-bit/4-bit' where projections differ, 'bfloat16'."""
        names = [
            self.parts[0].dtype if q is None else q.mode if q.mode != "affine" else f"{q.bits}-bit"
            for _, q in self.quantization
        ]
        return "/".join(dict.fromkeys(names))

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": [asdict(part) for part in self.parts],
            "quantization": {name: q and asdict(q) for name, q in self.quantization},
        }


def make_layout(
    arrays: Iterable[tuple[str, str, str, tuple[int, ...]]],
    quantization: Iterable[tuple[str, Quantization | None]],
) -> Layout:
    """Place (projection, param, dtype, shape of one expert) one after the other."""
    parts: list[Part] = []
    offset = 0
    for projection, param, dtype, shape in arrays:
        part = Part(projection, param, dtype, shape, offset)
        parts.append(part)
        offset = align(offset + part.nbytes, PART_ALIGNMENT)
    return Layout(tuple(parts), tuple(quantization))


def layout_from_json(value: object) -> Layout:
    """The layout that a manifest claims, or CheckpointError."""
    try:
        layout = _parse(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("the record layout in the manifest is not one we write") from error
    return layout


def _parse(value: Any) -> Layout:
    arrays = [
        (_text(p["projection"]), _text(p["param"]), _dtype(p["dtype"]), _shape(p["shape"]))
        for p in value["parts"]
    ]
    quantization = [
        (_text(name), None if q is None else _quantization(q))
        for name, q in value["quantization"].items()
    ]
    layout = make_layout(arrays, quantization)
    offsets = [part["offset"] for part in value["parts"]]
    _require(bool(layout.parts) and offsets == [part.offset for part in layout.parts])
    _require(len({part.name for part in layout.parts}) == len(layout.parts))
    _require({part.projection for part in layout.parts} == dict(quantization).keys())
    return layout


def _require(condition: bool) -> None:
    """`assert`, but under `python -O` too."""
    if not condition:
        raise ValueError


def _text(value: Any) -> str:
    _require(isinstance(value, str) and value.isidentifier())
    return str(value)


def _dtype(value: Any) -> str:
    _require(isinstance(value, str) and value in DTYPE_BYTES)
    return str(value)


def _shape(value: Any) -> tuple[int, ...]:
    _require(isinstance(value, list) and len(value) <= 2)
    _require(all(type(n) is int and 0 < n < 2**31 for n in value))
    return tuple(value)


def _quantization(value: dict[str, Any]) -> Quantization:
    bits, group_size, mode = value["bits"], value["group_size"], value["mode"]
    _require(type(bits) is int and 0 < bits <= 8 and type(group_size) is int and group_size > 0)
    return Quantization(bits, group_size, _text(mode))
