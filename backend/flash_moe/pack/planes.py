"""Routed experts of 4 bits in two planes of 2 bits, on their way into a pack.

Nothing is lost: both planes are the source's experts. Knows records and configs; how codes come
apart is given from above (split_planes.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx

from flash_moe.errors import OptionError
from flash_moe.format.layout import (
    CODES,
    PLANE_BITS,
    RESTS,
    Layout,
    Part,
    Quantization,
    make_layout,
)
from flash_moe.format.manifest import TWO_PLANES, Requantized
from flash_moe.pack.recast import CALIBRATED, Arrays, Columns, Importance, Spent


class Split(Protocol):
    def __call__(
        self, arrays: Arrays, source: Quantization, *, importance: Columns | None
    ) -> Arrays: ...


@dataclass(frozen=True, slots=True)
class Planes:
    """The source's groups, scales and codes; and a scale and bias more for the high halves, which
    `importance` weighs the errors of. `calibration` tells the text that it comes from."""

    split: Split = field(compare=False, repr=False)
    calibration: str | None = None
    importance: Importance | None = field(default=None, compare=False, repr=False)
    spent: Spent = field(default_factory=Spent, compare=False, repr=False)

    @property
    def how(self) -> str:
        return TWO_PLANES + (CALIBRATED if self.importance is not None else "")

    def weighed(self, importance: Importance) -> Planes:
        return replace(self, importance=importance)

    def to_json(self) -> dict[str, Any]:
        """What another choice is told by."""
        told = {"method": TWO_PLANES}
        return told if self.calibration is None else {**told, "calibration": self.calibration}

    def layout(self, source: Layout, path: str) -> Layout:
        """The record that comes of a source's; OptionError if it cannot be."""
        for name, packing in source.quantization:
            _require_four_bits(f"{path}.{name}", packing)
        first = [(p.projection, p.param, p.dtype, _first_shape(p)) for p in source.parts]
        last = dict(zip(CODES, RESTS, strict=True))
        rest = [(name, last[q], dtype, shape) for name, q, dtype, shape in first if q in last]
        return make_layout([*first, *rest], source.quantization)

    def projection(
        self, arrays: Arrays, source: Quantization | None, path: str, name: str, expert: int
    ) -> Arrays:
        """One projection of one expert in two planes: its arrays by parameter."""
        assert source is not None
        with self.spent.on(arrays):
            columns = self.importance.of(path, name, expert) if self.importance else None
            made = self.split(arrays, source, importance=columns)
            mx.eval(made)
        return {**arrays, **made}

    def config(self, config: dict[str, Any], layouts: dict[str, Layout]) -> dict[str, Any]:
        """For mlx-lm, the experts are what they were."""
        return config

    def summary(self, layouts: Iterable[Layout]) -> Requantized:
        """For the manifest, of layouts that `layout` takes."""
        kinds = dict(pair for layout in layouts for pair in layout.quantization)
        packing = next(packing for packing in kinds.values() if packing is not None)
        return Requantized(PLANE_BITS, packing.group_size, self.how, f"{packing.bits}-bit")


def _require_four_bits(path: str, packing: Quantization | None) -> None:
    if packing is None or packing.mode != "affine" or packing.bits != 2 * PLANE_BITS:
        kind = "not quantized" if packing is None else packing.mode
        if packing is not None and packing.mode == "affine":
            kind = f"{packing.bits}-bit"
        raise OptionError(
            f"{path} is {kind}: only experts of 4 bits (affine) come apart into two planes. Give "
            "it fewer bits with --bits, or pack it as it is: leave out --planes"
        )


def _first_shape(part: Part) -> tuple[int, ...]:
    if part.param != "weight":
        return part.shape
    return part.shape[0], part.shape[1] // 2
