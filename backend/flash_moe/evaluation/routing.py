"""Which experts the routers choose: how often each, and how evenly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash_moe.checkpoint.locations import ExpertLayer
from flash_moe.evaluation.arrays import Array
from flash_moe.kernels.spec import U32
from flash_moe.stream.streamed import Streamer

Counts = NDArray[np.int64]


class RoutingCounter:
    """Counts the choices of every layer inside of `counting`: a count of K numbers for every token
    and layer."""

    def __init__(self, streamer: Streamer) -> None:
        self._streamer = streamer
        self._counts = [np.zeros(layer.experts, np.int64) for layer in streamer.store.layers]

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._streamer.observer = self._add
        try:
            yield
        finally:
            self._streamer.observer = None

    def row(self) -> Array:
        """The counts of all layers one after the other, as integers no wider than they need."""
        row = np.concatenate(self._counts)
        return row.astype(np.min_scalar_type(int(np.max(row))))

    def _add(self, layer: int, experts: U32) -> None:
        counts = self._counts[layer]
        counts += np.bincount(experts.reshape(-1), minlength=len(counts))


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """How often each expert of one layer was chosen. `path` is the layer's name in the model."""

    path: str
    counts: Counts

    @property
    def entropy_bits(self) -> float:
        """log2 of the number of experts if all are used alike, 0 if only one is used."""
        return entropy(self.counts)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "entropy_bits": self.entropy_bits,
            "counts": self.counts.tolist(),
        }


@dataclass(frozen=True, slots=True)
class Routing:
    """Of all layers; bits are means over them."""

    layers: Sequence[LayerRouting]

    @classmethod
    def from_row(cls, layers: Sequence[ExpertLayer], row: Array) -> Routing:
        """From RoutingCounter.row, or the sum of several."""
        ends = np.cumsum([layer.experts for layer in layers])
        parts = np.split(row.astype(np.int64), ends[:-1])
        return cls([LayerRouting(one.path, part) for one, part in zip(layers, parts, strict=True)])

    @property
    def entropy_bits(self) -> float:
        return float(np.mean([layer.entropy_bits for layer in self.layers]))

    @property
    def most_bits(self) -> float:
        """The entropy if all experts were used alike."""
        return float(np.mean([np.log2(len(layer.counts)) for layer in self.layers]))

    @property
    def unused_experts(self) -> int:
        return int(sum((layer.counts == 0).sum() for layer in self.layers))

    def summary(self) -> dict[str, Any]:
        return {
            "entropy_bits": self.entropy_bits,
            "most_bits": self.most_bits,
            "unused_experts": self.unused_experts,
        }

    def to_json(self) -> dict[str, Any]:
        return {**self.summary(), "layers": [layer.to_json() for layer in self.layers]}


def entropy(counts: Counts) -> float:
    """In bits, of choices that were made this often; 0 if none were."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(max(0.0, -(shares * np.log2(shares)).sum()))
