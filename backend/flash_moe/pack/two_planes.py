"""Routed experts of 4 bits in two planes of 2 bits. Both planes together are the source's experts,
bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from flash_moe.errors import OptionError, Remedy
from flash_moe.format.layout import (
    AFFINE,
    PLANE_BITS,
    SECOND_PLANE,
    Layout,
    Part,
    Quantization,
    make_layout,
)
from flash_moe.format.manifest import TWO_PLANES, Requantized
from flash_moe.pack.split_planes import split_planes
from flash_moe.pack.transform import CALIBRATED, Arrays, Importance, TransformCost


@dataclass(frozen=True, slots=True)
class TwoPlanes:
    """The source's groups, scales and codes; and another scale and bias for the first plane, whose
    errors `importance` weighs. `calibration` is the digest of the text that it comes from."""

    calibration: str | None = None
    importance: Importance | None = field(default=None, compare=False, repr=False)
    cost: TransformCost = field(default_factory=TransformCost, compare=False, repr=False)

    @property
    def how(self) -> str:
        return TWO_PLANES + (CALIBRATED if self.importance is not None else "")

    def weighed_by(self, importance: Importance) -> TwoPlanes:
        return replace(self, importance=importance)

    def to_json(self) -> dict[str, Any]:
        """Written to disk: packs that an older version began are resumed by these keys."""
        if self.calibration is None:
            return {"method": TWO_PLANES}
        return {"method": TWO_PLANES, "calibration": self.calibration}

    def layout(self, source: Layout, path: str) -> Layout:
        for name, packing in source.quantization:
            _require_four_bits(f"{path}.{name}", packing)
        first = [(p.projection, p.param, p.dtype, _first_shape(p)) for p in source.parts]
        other = dict(zip(AFFINE, SECOND_PLANE, strict=True))
        second = [
            (name, other[param], dtype, shape)
            for name, param, dtype, shape in first
            if param in other
        ]
        return make_layout([*first, *second], source.quantization)

    def apply(
        self, arrays: Arrays, source: Quantization | None, path: str, projection: str, expert: int
    ) -> Arrays:
        assert source is not None  # `layout` refuses others
        with self.cost.count(arrays):
            columns = self.importance.of(path, projection, expert) if self.importance else None
            planes = split_planes(arrays, source, columns)
            mx.eval(planes)
        return {**arrays, **planes}

    def config(self, config: dict[str, Any], layouts: dict[str, Layout]) -> dict[str, Any]:
        """For mlx-lm, the experts are what they were."""
        return config

    def summary(self, layouts: Iterable[Layout]) -> Requantized:
        packings = dict(pair for layout in layouts for pair in layout.quantization)
        packing = next(packing for packing in packings.values() if packing is not None)
        return Requantized(PLANE_BITS, packing.group_size, self.how, f"{packing.bits}-bit")


def _require_four_bits(path: str, packing: Quantization | None) -> None:
    if packing is not None and (packing.mode, packing.bits) == ("affine", 2 * PLANE_BITS):
        return
    raise OptionError(
        f"{path} is {_kind(packing)}: only experts of 4 bits (affine) can be split into two "
        "planes. Pack them with bits, or without planes.",
        Remedy.PACK_WITHOUT_PLANES,
    )


def _kind(packing: Quantization | None) -> str:
    if packing is None:
        return "not quantized"
    return f"{packing.bits}-bit" if packing.mode == "affine" else packing.mode


def _first_shape(part: Part) -> tuple[int, ...]:
    if part.param != "weight":
        return part.shape
    return part.shape[0], part.shape[1] // 2
