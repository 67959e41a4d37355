"""What is done to routed experts on their way into a pack, while everything else stays as it is;
and the first such thing, fewer bits.

Knows records and configs; how weights become codes is given from above (requantize.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_moe.errors import OptionError
from flash_moe.format.layout import CODES, FLOATS, Layout, Quantization, make_layout
from flash_moe.format.manifest import Requantized

CALIBRATED = ", calibrated"

Arrays = dict[str, mx.array]
# A number for each column of a matrix.
Columns = npt.NDArray[np.float32]


class Importance(Protocol):
    def of(self, path: str, projection: str, expert: int) -> Columns | None:
        """How much errors in each column of a matrix weigh; None: all alike."""


class Quantize(Protocol):
    def __call__(
        self,
        arrays: Arrays,
        source: Quantization | None,
        bits: int,
        group_size: int,
        *,
        importance: Columns | None,
    ) -> tuple[mx.array, mx.array, mx.array]: ...


@dataclass(slots=True)
class Spent:
    """What went in, and what it took: processor time of all threads, and time on the clock."""

    nbytes: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    @contextmanager
    def on(self, arrays: Arrays) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu_seconds += time.process_time() - cpu
        self.seconds += time.perf_counter() - start
        self.nbytes += sum(arrays[name].nbytes for name in CODES if name in arrays)


class Change(Protocol):
    """What `pack` asks of it, with every source layout given by the path of its switch layer."""

    @property
    def how(self) -> str:
        """For people: the method, and whether errors were weighed."""

    @property
    def importance(self) -> Importance | None: ...

    @property
    def spent(self) -> Spent: ...

    def weighed(self, importance: Importance) -> Change:
        """The same with errors weighed."""

    def to_json(self) -> dict[str, Any]:
        """What another choice is told by."""

    def layout(self, source: Layout, path: str) -> Layout:
        """The record that comes of a source's; OptionError if it cannot be."""

    def projection(
        self, arrays: Arrays, source: Quantization | None, path: str, name: str, expert: int
    ) -> Arrays:
        """One projection of one expert, changed: its arrays by parameter."""

    def config(self, config: dict[str, Any], layouts: dict[str, Layout]) -> dict[str, Any]:
        """A config that says so, as mlx-lm's loader looks it up."""

    def summary(self, layouts: Iterable[Layout]) -> Requantized:
        """For the manifest, of layouts that `layout` takes."""


@dataclass(frozen=True, slots=True)
class Recast:
    """Affine, `bits` a weight. Matrices that have no more bits than that are left alone.
    `calibration` tells the text that `importance` comes from, before it is known."""

    bits: int
    group_size: int
    method: str
    quantize: Quantize = field(compare=False, repr=False)
    calibration: str | None = None
    importance: Importance | None = field(default=None, compare=False, repr=False)
    spent: Spent = field(default_factory=Spent, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        told = {"bits": self.bits, "group_size": self.group_size, "method": self.method}
        return told if self.calibration is None else {**told, "calibration": self.calibration}

    def weighed(self, importance: Importance) -> Recast:
        return replace(self, importance=importance)

    @property
    def how(self) -> str:
        return self.method + (CALIBRATED if self.importance is not None else "")

    def changes(self, quantization: Quantization | None) -> bool:
        return quantization is None or quantization.bits > self.bits

    def layout(self, source: Layout, path: str) -> Layout:
        arrays: list[tuple[str, str, str, tuple[int, ...]]] = []
        quantization: list[tuple[str, Quantization | None]] = []
        for name, old in source.quantization:
            parts = {p.param: p for p in source.parts if p.projection == name}
            if not self.changes(old):
                arrays += [(name, p.param, p.dtype, p.shape) for p in parts.values()]
                quantization.append((name, old))
                continue
            rows, columns, dtype = self._matrix(source, f"{path}.{name}", name)
            groups = (rows, columns // self.group_size)
            arrays.append((name, "weight", "uint32", (rows, columns * self.bits // 32)))
            arrays += [(name, "scales", dtype, groups), (name, "biases", dtype, groups)]
            rest = (p for param, p in parts.items() if param not in CODES)
            arrays += [(name, p.param, p.dtype, p.shape) for p in rest]
            quantization.append((name, Quantization(self.bits, self.group_size, "affine")))
        return make_layout(arrays, quantization)

    def projection(
        self, arrays: Arrays, source: Quantization | None, path: str, name: str, expert: int
    ) -> Arrays:
        if not self.changes(source):
            return arrays
        with self.spent.on(arrays):
            columns = self.importance.of(path, name, expert) if self.importance else None
            made = self.quantize(arrays, source, self.bits, self.group_size, importance=columns)
            mx.eval(made)
        return {**arrays, **dict(zip(CODES, made, strict=True))}

    def config(self, config: dict[str, Any], layouts: dict[str, Layout]) -> dict[str, Any]:
        """It says so of every matrix."""
        changed = copy.deepcopy(config)
        # Without quantization of its own, the rest of the model has no scales and stays plain.
        own = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        quantization = changed.setdefault("quantization", dict(own))
        for path, layout in layouts.items():
            quantization |= {
                f"{path}.{name}": dict(own)
                for name, _ in layout.quantization
                if self.changes(dict(layout.quantization)[name])
            }
        return changed

    def summary(self, layouts: Iterable[Layout]) -> Requantized:
        """Refuses to change nothing."""
        layouts = list(layouts)
        source = " and ".join(dict.fromkeys(layout.bits for layout in layouts))
        if not any(self.changes(old) for layout in layouts for _, old in layout.quantization):
            raise OptionError(
                f"The experts have no more than {self.bits} bits already ({source}). Pack them as "
                "they are: leave out --bits"
            )
        return Requantized(self.bits, self.group_size, self.how, source)

    def _matrix(self, layout: Layout, path: str, name: str) -> tuple[int, int, str]:
        """Rows, columns and the type of scales, of a matrix that can be recast."""
        parts = {p.param: p for p in layout.parts if p.projection == name}
        old = dict(layout.quantization)[name]
        if old is None and parts["weight"].dtype in FLOATS:
            rows, columns = parts["weight"].shape
            dtype = parts["weight"].dtype
        elif old is not None and old.mode == "affine" and parts.keys() >= set(CODES):
            rows, groups = parts["scales"].shape
            columns, dtype = groups * old.group_size, parts["scales"].dtype
        else:
            kind = old.mode if old else parts["weight"].dtype
            raise OptionError(
                f"{path} is {kind}: only affine and unquantized experts can be given other bits. "
                "Pack them as they are: leave out --bits"
            )
        if columns % self.group_size:
            raise OptionError(
                f"{path} has {columns} columns, which groups of {self.group_size} do not divide. "
                "Choose another --group-size, or leave out --bits."
            )
        return rows, columns, dtype
