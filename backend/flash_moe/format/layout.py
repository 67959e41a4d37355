"""How one expert lies in memory and in a pack: the parts of a record and their places.

A record holds, for each projection in order, its weight, scales, biases and what else mlx-lm's
module has, one after the other. 4-bit codes may be stored in two planes: the first plane is the
high two bits of every code, a 2-bit matrix with a scale and bias of its own; the second is the low
two bits, with the scales and biases of the 4-bit weights. All first planes come before all second
ones, so that they are one short read. Everything here is plain numbers, so that a manifest can
carry it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from flash_moe.errors import CheckpointError
from flash_moe.format.dtypes import BY_NAME, FLOATS

# A page on Apple Silicon, and a multiple of any disk's block: records start on it, so that direct
# I/O and the page cache see whole pages. The 397B records need no padding at all for it.
RECORD_ALIGNMENT = 16384
# A cache line; kernels may load 16-byte vectors from the start of any part.
PART_ALIGNMENT = 64

# The parameters of an affine projection: codes, and a scale and bias for each group of them.
AFFINE = ("weight", "scales", "biases")
# The same of the second plane. The names are those in the manifests of packs.
SECOND_PLANE = ("rest", "rest_scales", "rest_biases")
PLANE_BITS = 2

# What a record may hold: mlx-lm's projections have no other types.
RECORD_DTYPES = ("uint8", "uint16", "uint32", *FLOATS)


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
        return prod(self.shape) * BY_NAME[self.dtype].nbytes

    @property
    def name(self) -> str:
        return f"{self.projection}.{self.param}"

    @property
    def in_second_plane(self) -> bool:
        return self.param in SECOND_PLANE


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
    def two_planes(self) -> bool:
        return self.parts[-1].in_second_plane

    @property
    def first_plane_bytes(self) -> int:
        """What is read of a record for its first plane: all, where it has but one."""
        return next((part.offset for part in self.parts if part.in_second_plane), self.stride)

    @property
    def bits(self) -> str:
        """For people: '4-bit', 'mxfp4', '2-bit/4-bit' where projections differ, 'bfloat16'."""
        names = [self._bits_of(name, q) for name, q in self.quantization]
        return "/".join(dict.fromkeys(names)) + (" in two planes" if self.two_planes else "")

    def _bits_of(self, projection: str, quantization: Quantization | None) -> str:
        if quantization is None:
            return next(part.dtype for part in self.parts if part.projection == projection)
        affine = quantization.mode == "affine"
        return f"{quantization.bits}-bit" if affine else quantization.mode

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": [asdict(part) for part in self.parts],
            "quantization": {name: q and asdict(q) for name, q in self.quantization},
        }


def make_layout(
    arrays: Iterable[tuple[str, str, str, tuple[int, ...]]],
    quantization: Iterable[tuple[str, Quantization | None]],
) -> Layout:
    """Place (projection, param, dtype, shape of one expert) one after the other. The second plane
    begins on a page, as direct I/O wants it; for that, the 397B needs no padding either."""
    parts: list[Part] = []
    offset = 0
    for projection, param, dtype, shape in arrays:
        if param in SECOND_PLANE and parts and not parts[-1].in_second_plane:
            offset = align(offset, RECORD_ALIGNMENT)
        part = Part(projection, param, dtype, shape, offset)
        parts.append(part)
        offset = align(offset + part.nbytes, PART_ALIGNMENT)
    return Layout(tuple(parts), tuple(quantization))


def in_one_plane(layout: Layout) -> Layout:
    """The same experts as mlx-lm has them."""
    if not layout.two_planes:
        return layout
    arrays = []
    for part in layout.parts:
        if not part.in_second_plane:
            shape = part.shape
            if part.param == "weight":
                shape = (shape[0], 2 * shape[1])
            arrays.append((part.projection, part.param, part.dtype, shape))
    return make_layout(arrays, layout.quantization)


def layout_from_json(value: object) -> Layout:
    """The layout that a manifest claims, or CheckpointError."""
    try:
        return _parse(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("the record layout in the manifest is not one we write") from error


def _parse(value: Any) -> Layout:
    arrays = [
        (_name(p["projection"]), _name(p["param"]), _dtype(p["dtype"]), _shape(p["shape"]))
        for p in value["parts"]
    ]
    quantization = [
        (_name(name), None if q is None else _quantization(q))
        for name, q in value["quantization"].items()
    ]
    layout = make_layout(arrays, quantization)
    offsets = [part["offset"] for part in value["parts"]]
    _require(bool(layout.parts) and offsets == [part.offset for part in layout.parts])
    _require(len({part.name for part in layout.parts}) == len(layout.parts))
    _require({part.projection for part in layout.parts} == dict(quantization).keys())
    if any(part.in_second_plane for part in layout.parts):
        _require_planes(layout)
    return layout


def _require_planes(layout: Layout) -> None:
    """Every projection has both planes, of fitting shapes, and the second ones come last."""
    second = [part.in_second_plane for part in layout.parts]
    _require(second == sorted(second))
    parts = {part.name: (part.dtype, part.shape) for part in layout.parts}
    for name, packing in layout.quantization:
        weight, scales, biases = (parts[f"{name}.{param}"] for param in AFFINE)
        _require([parts[f"{name}.{param}"] for param in SECOND_PLANE] == [weight, scales, biases])
        if packing is None or (packing.bits, packing.mode) != (2 * PLANE_BITS, "affine"):
            raise ValueError(name)
        _require(weight[0] == "uint32" and scales[0] in FLOATS and scales == biases)
        (rows, groups), (weight_rows, words) = scales[1], weight[1]
        _require(rows == weight_rows and groups * packing.group_size * PLANE_BITS == 32 * words)


def _require(condition: bool) -> None:
    """`assert`, but under `python -O` too."""
    if not condition:
        raise ValueError


def _name(value: Any) -> str:
    _require(isinstance(value, str) and value.isidentifier())
    return str(value)


def _dtype(value: Any) -> str:
    _require(isinstance(value, str) and value in RECORD_DTYPES)
    return str(value)


def _shape(value: Any) -> tuple[int, ...]:
    _require(isinstance(value, list) and len(value) <= 2)
    _require(all(type(n) is int and 0 < n < 2**31 for n in value))
    return tuple(value)


def _quantization(value: dict[str, Any]) -> Quantization:
    bits, group_size, mode = value["bits"], value["group_size"], value["mode"]
    _require(type(bits) is int and 0 < bits <= 8 and type(group_size) is int and group_size > 0)
    return Quantization(bits, group_size, _name(mode))
