"""What may be done to routed experts on their way into a pack: the protocol that the writer of
records and the planner know. All other weights stay as they are.

fewer_bits.py and two_planes.py are the two transforms; neither knows files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_moe.format.layout import AFFINE, Layout, Quantization
from flash_moe.format.manifest import Requantized

# What a manifest adds to the name of a method that weighs errors.
CALIBRATED = ", calibrated"

# The arrays of one projection, by parameter.
Arrays = dict[str, mx.array]
# A number for each column of a matrix.
Columns = npt.NDArray[np.float32]


class Importance(Protocol):
    def of(self, path: str, projection: str, expert: int) -> Columns | None:
        """How much errors in each column of a matrix count; None: all alike."""


@dataclass(slots=True)
class TransformCost:
    """Bytes that were transformed, processor time of all threads, and time on the clock."""

    nbytes: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    @contextmanager
    def count(self, arrays: Arrays) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu_seconds += time.process_time() - cpu
        self.seconds += time.perf_counter() - start
        self.nbytes += sum(arrays[name].nbytes for name in AFFINE if name in arrays)


class ExpertTransform(Protocol):
    """Source layouts are given by the path of their switch layer."""

    @property
    def how(self) -> str:
        """The method as the manifest names it, and whether errors were weighed."""

    @property
    def importance(self) -> Importance | None: ...

    @property
    def cost(self) -> TransformCost:
        """The total so far."""

    def weighed_by(self, importance: Importance) -> ExpertTransform:
        """The same transform, with errors weighed."""

    def to_json(self) -> dict[str, Any]:
        """Identifies this transform when a pack is resumed."""

    def layout(self, source: Layout, path: str) -> Layout:
        """The record that a source's record becomes; OptionError if it cannot be transformed."""

    def apply(
        self, arrays: Arrays, source: Quantization | None, path: str, projection: str, expert: int
    ) -> Arrays:
        """Transform one projection of one expert."""

    def config(self, config: dict[str, Any], layouts: dict[str, Layout]) -> dict[str, Any]:
        """The config with the new quantization, where mlx-lm's loader looks it up."""

    def summary(self, layouts: Iterable[Layout]) -> Requantized:
        """The manifest's entry, for source layouts that `layout` accepts; OptionError if the
        transform would change none of them."""


def require_sound(importance: Columns, columns: int) -> None:
    sound = bool((np.isfinite(importance) & (importance >= 0)).all())
    if importance.shape != (columns,) or not sound:
        raise ValueError(
            f"importance has shape {list(importance.shape)} for {columns} columns, or numbers "
            "that are negative or not finite"
        )
