"""Which experts the routers choose: how often each, and how evenly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from flash_moe.kernels.gpu import U32
from flash_moe.stream.store import ExpertLayer
from flash_moe.stream.streamed import Streamer


class Routing:
    """Counts for every layer while `watching`. Costs a count of K numbers a token and layer."""

    def __init__(self, streamer: Streamer) -> None:
        self._streamer = streamer
        self._layers: list[ExpertLayer] = list(streamer.store.layers)
        self.counts = [np.zeros(layer.experts, np.int64) for layer in self._layers]

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._streamer.watch = self._add
        try:
            yield
        finally:
            self._streamer.watch = None

    def taken(self) -> np.ndarray[Any, np.dtype[Any]]:
        """All counts in a row, in the fewest bytes, and none of them here any longer."""
        found = np.concatenate(self.counts)
        for counts in self.counts:
            counts[:] = 0
        return found.astype(np.min_scalar_type(int(found.max())))

    def add(self, taken: np.ndarray[Any, np.dtype[Any]]) -> None:
        ends = np.cumsum([len(counts) for counts in self.counts])
        for counts, more in zip(self.counts, np.split(taken, ends[:-1]), strict=True):
            counts += more.astype(np.int64)

    def _add(self, layer: int, chosen: U32) -> None:
        counts = self.counts[layer]
        counts += np.bincount(chosen.reshape(-1), minlength=len(counts))

    @property
    def entropies(self) -> list[float]:
        """Of each layer, in bits: log2 of the number of experts if all are used alike."""
        return [entropy(counts) for counts in self.counts]

    def summary(self) -> dict[str, Any]:
        return {
            "entropy_bits": float(np.mean(self.entropies)),
            "most_bits": float(np.mean([np.log2(len(counts)) for counts in self.counts])),
            "unused_experts": int(sum((counts == 0).sum() for counts in self.counts)),
        }

    def to_json(self) -> dict[str, Any]:
        layers = zip(self._layers, self.counts, self.entropies, strict=True)
        return {
            **self.summary(),
            "layers": [
                {"path": layer.path, "entropy_bits": bits, "counts": counts.tolist()}
                for layer, counts, bits in layers
            ],
        }


def entropy(counts: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Of the choice that these counts are of, in bits; 0 if nothing was chosen."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(max(0.0, -(shares * np.log2(shares)).sum()))
