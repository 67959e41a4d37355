"""Routed experts with fewer bits than the source's."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from flash_moe.errors import NativeUnavailable, OptionError, Remedy
from flash_moe.format.dtypes import FLOATS
from flash_moe.format.layout import AFFINE, Layout, Part, Quantization, make_layout
from flash_moe.format.manifest import Requantized
from flash_moe.options import PACK_BITS, PACK_GROUP_SIZES
from flash_moe.pack.fit import load_fit
from flash_moe.pack.requantize import Quantize, fit_in_mlx, fit_native
from flash_moe.pack.transform import CALIBRATED, Arrays, Importance, TransformCost

GROUP_SIZE = 64
TRIED_WEIGHTS = 1 << 19


@dataclass(frozen=True, slots=True)
class FewerBits:
    """Affine, `bits` a weight. Matrices that have no more bits than that are left alone. `method`
    names `quantize` in the manifest; `calibration` is the digest of the text that `importance`
    comes from, and is known before it."""

    bits: int
    group_size: int
    method: str
    quantize: Quantize = field(compare=False, repr=False)
    calibration: str | None = None
    importance: Importance | None = field(default=None, compare=False, repr=False)
    cost: TransformCost = field(default_factory=TransformCost, compare=False, repr=False)

    @property
    def how(self) -> str:
        return self.method + (CALIBRATED if self.importance is not None else "")

    def weighed_by(self, importance: Importance) -> FewerBits:
        return replace(self, importance=importance)

    def to_json(self) -> dict[str, Any]:
        """Written to disk: packs that an older version began are resumed by these keys."""
        identity: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "method": self.method,
        }
        if self.calibration is None:
            return identity
        return {**identity, "calibration": self.calibration}

    def changes(self, quantization: Quantization | None) -> bool:
        return quantization is None or quantization.bits > self.bits

    def layout(self, source: Layout, path: str) -> Layout:
        arrays: list[tuple[str, str, str, tuple[int, ...]]] = []
        quantization: list[tuple[str, Quantization | None]] = []
        for name, old in source.quantization:
            parts = {part.param: part for part in source.parts if part.projection == name}
            if self.changes(old):
                arrays += self._requantized_parts(parts, old, f"{path}.{name}")
                old = Quantization(self.bits, self.group_size, "affine")
            else:
                arrays += [(name, p.param, p.dtype, p.shape) for p in parts.values()]
            quantization.append((name, old))
        return make_layout(arrays, quantization)

    def apply(
        self, arrays: Arrays, source: Quantization | None, path: str, projection: str, expert: int
    ) -> Arrays:
        if not self.changes(source):
            return arrays
        with self.cost.count(arrays):
            columns = self.importance.of(path, projection, expert) if self.importance else None
            matrix = self.quantize(arrays, source, self.bits, self.group_size, columns)
            mx.eval(matrix)
        return {**arrays, **dict(zip(AFFINE, matrix, strict=True))}

    def config(self, config: dict[str, Any], layouts: dict[str, Layout]) -> dict[str, Any]:
        changed = copy.deepcopy(config)
        # Without quantization of its own, the rest of the model has no scales and stays plain.
        own = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        quantization = changed.setdefault("quantization", dict(own))
        for path, layout in layouts.items():
            quantization |= {
                f"{path}.{name}": dict(own)
                for name, old in layout.quantization
                if self.changes(old)
            }
        return changed

    def summary(self, layouts: Iterable[Layout]) -> Requantized:
        layouts = list(layouts)
        source = " and ".join(dict.fromkeys(layout.bits for layout in layouts))
        if not any(self.changes(old) for layout in layouts for _, old in layout.quantization):
            raise OptionError(
                f"The experts have no more than {self.bits} bits already ({source}). Pack them "
                "without bits.",
                Remedy.PACK_WITHOUT_BITS,
            )
        return Requantized(self.bits, self.group_size, self.how, source)

    def slow_seconds(self, layers: dict[str, tuple[Layout, int]]) -> float | None:
        """How long the fit in MLX takes for all experts of some layers, tried on a few rows; None
        where the fit in C is used."""
        if self.quantize is not fit_in_mlx:
            return None
        weights, columns = 0, self.group_size
        for path, (layout, experts) in layers.items():
            for name, old in layout.quantization:
                if self.changes(old):
                    parts = {part.param: part for part in layout.parts if part.projection == name}
                    rows, columns, _ = _matrix(parts, old, path)
                    weights += experts * rows * columns
        rows = max(1, TRIED_WEIGHTS // columns)
        sample = mx.random.normal((rows, columns), key=mx.random.key(0))
        for _ in range(2):  # MLX compiles at the first
            start = time.perf_counter()
            mx.eval(fit_in_mlx({"weight": sample}, None, self.bits, self.group_size, None))
        return (time.perf_counter() - start) * weights / sample.size

    def _requantized_parts(
        self, parts: dict[str, Part], old: Quantization | None, path: str
    ) -> list[tuple[str, str, str, tuple[int, ...]]]:
        rows, columns, dtype = _matrix(parts, old, path)
        if columns % self.group_size:
            raise OptionError(
                f"{path} has {columns} columns, which groups of {self.group_size} do not divide. "
                "Choose another group_size, or pack the experts without bits.",
                Remedy.OTHER_GROUP_SIZE,
            )
        name, groups = parts["weight"].projection, (rows, columns // self.group_size)
        rest = (part for param, part in parts.items() if param not in AFFINE)
        return [
            (name, "weight", "uint32", (rows, columns * self.bits // 32)),
            (name, "scales", dtype, groups),
            (name, "biases", dtype, groups),
            *((name, part.param, part.dtype, part.shape) for part in rest),
        ]


def fewer_bits(
    bits: int,
    group_size: int | None = None,
    calibration: str | None = None,
    load: Callable[[], object] = load_fit,
) -> FewerBits:
    """The transform for the bits and the group size that are asked for, or OptionError. `load`
    raises NativeUnavailable where the fit in C cannot be used."""
    group_size = GROUP_SIZE if group_size is None else group_size
    _require("bits", bits, PACK_BITS)
    _require("group_size", group_size, PACK_GROUP_SIZES)
    try:
        load()
    except NativeUnavailable:
        return FewerBits(bits, group_size, "fit in MLX", fit_in_mlx, calibration)
    return FewerBits(bits, group_size, "fit", fit_native, calibration)


def _require(name: str, value: int, choices: tuple[int, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name}={value}: choose {' or '.join(map(str, choices))}.")


def _matrix(parts: dict[str, Part], old: Quantization | None, path: str) -> tuple[int, int, str]:
    """Rows, columns and the type of scales of a matrix that can be requantized."""
    weight = parts["weight"]
    if old is None and weight.dtype in FLOATS:
        rows, columns = weight.shape
        return rows, columns, weight.dtype
    if old is not None and old.mode == "affine" and parts.keys() >= set(AFFINE):
        rows, groups = parts["scales"].shape
        return rows, groups * old.group_size, parts["scales"].dtype
    raise OptionError(
        f"{path} is {old.mode if old else weight.dtype}: only affine and unquantized experts can "
        "be given fewer bits. Pack them without bits.",
        Remedy.PACK_WITHOUT_BITS,
    )
