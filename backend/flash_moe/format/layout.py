"""How one expert lies in memory and in a pack: the parts of a record and their places.

A record holds, for each projection in order, its weight, scales, biases and what else mlx-lm's
module has, one after the other. Where codes of 4 bits are kept in two planes, those are the first
plane's, and behind all of them comes the rest, so that the first planes are one short read.
Everything here is plain numbers, so that a manifest can carry it.
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

CODES = ("weight", "scales", "biases")
# Of a projection in two planes: the low halves of its codes, and scales and biases for whole ones.
RESTS = ("rest", "rest_scales", "rest_biases")
PLANE_BITS = 2
FLOATS = ("bfloat16", "float16", "float32")

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
    """A record: its parts, and how each projection is quantized (None: not at all), both planes
    together where it has two."""

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
    def planes(self) -> bool:
        return self.parts[-1].param in RESTS

    @property
    def first_bytes(self) -> int:
        """What is read of a record for its first plane: all, where it has but one."""
        return next((part.offset for part in self.parts if part.param in RESTS), self.stride)

    @property
    def bits(self) -> str:
        """For people: '4-bit', 'mxfp4', '2-bit/4-bit' where projections differ, 'bfloat16'."""
        names = [
            self.parts[0].dtype if q is None else q.mode if q.mode != "affine" else f"{q.bits}-bit"
            for _, q in self.quantization
        ]
        return "/".join(dict.fromkeys(names)) + (" in two planes" if self.planes else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": [asdict(part) for part in self.parts],
            "quantization": {name: q and asdict(q) for name, q in self.quantization},
        }


def make_layout(
    arrays: Iterable[tuple[str, str, str, tuple[int, ...]]],
    quantization: Iterable[tuple[str, Quantization | None]],
) -> Layout:
    """Place (projection, param, dtype, shape of one expert) one after the other; the rest begins
    on a page, as direct I/O wants it. For that, the 397B needs no padding either."""
    parts: list[Part] = []
    offset = 0
    for projection, param, dtype, shape in arrays:
        if param in RESTS and parts and parts[-1].param not in RESTS:
            offset = align(offset, RECORD_ALIGNMENT)
        part = Part(projection, param, dtype, shape, offset)
        parts.append(part)
        offset = align(offset + part.nbytes, PART_ALIGNMENT)
    return Layout(tuple(parts), tuple(quantization))


def joined(layout: Layout) -> Layout:
    """The same experts in one plane, as mlx-lm has them."""
    if not layout.planes:
        return layout
    arrays = []
    for part in layout.parts:
        if part.param not in RESTS:
            shape = part.shape
            if part.param == "weight":
                shape = (shape[0], 2 * shape[1])
            arrays.append((part.projection, part.param, part.dtype, shape))
    return make_layout(arrays, layout.quantization)


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
    if any(part.param in RESTS for part in layout.parts):
        _require_planes(layout)
    return layout


def _require_planes(layout: Layout) -> None:
    """Every projection has both planes, of fitting shapes, and the second ones come last."""
    last = [part.param in RESTS for part in layout.parts]
    _require(last == sorted(last))
    parts = {part.name: (part.dtype, part.shape) for part in layout.parts}
    for name, packing in layout.quantization:
        weight, scales, biases = (parts[f"{name}.{param}"] for param in CODES)
        _require([parts[f"{name}.{param}"] for param in RESTS] == [weight, scales, biases])
        if packing is None or (packing.bits, packing.mode) != (2 * PLANE_BITS, "affine"):
            raise ValueError(name)
        _require(weight[0] == "uint32" and scales[0] in FLOATS and scales == biases)
        (rows, groups), (also, words) = scales[1], weight[1]
        _require(rows == also and groups * packing.group_size * PLANE_BITS == 32 * words)


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
