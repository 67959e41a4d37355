"""The streamed experts: a module that stands where mlx-lm's SwitchGLU or SwitchMLP stood.

It keeps mlx-lm's own module and calls it, with the bank's slots in the place of the stacked
weights and slot numbers in the place of expert numbers. So the activation, the biases, the sort
of large batches and every quantization mode are mlx-lm's code, and the result is the same to
the bit; only the expert axis is shorter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.experts.bank import Bank, Lane
from flash_moe.experts.layout import Layout
from flash_moe.experts.reader import Reader, Target
from flash_moe.experts.store import ExpertStore


@dataclass(slots=True)
class Streamer:
    """What all streamed layers of a model share. Used by one thread, the one that evaluates."""

    store: ExpertStore
    reader: Reader
    bank: Bank
    # Seconds spent waiting for the router's choice, which includes all computing before it.
    readback_seconds: float = 0.0
    # Seconds spent waiting for a lane's last output, which is computing too.
    fence_seconds: float = 0.0
    # Experts asked for in one layer of one call, at most: what a bigger bank would serve at once.
    widest: int = field(default=0)

    def load(self, layer: int, experts: list[int]) -> Lane:
        """Read experts of a layer into the next lane; expert `experts[i]` is in slot i."""
        start = time.perf_counter()
        lane = self.bank.take(experts)
        self.fence_seconds += time.perf_counter() - start
        targets: list[Target] = []
        for expert, buffer in zip(experts, lane.buffers, strict=False):
            for segment in self.store.segments(layer, expert):
                targets.append((segment, buffer[segment.at : segment.at + segment.length]))
        self.reader.read(targets)
        self.reader.counters.experts += len(experts)
        return lane


class StreamedSwitch(nn.Module):
    """`(x [..., H], indices [..., k]) → [..., k, H]`, the experts read from disk."""

    def __init__(
        self,
        streamer: Streamer,
        layer: int,
        inner: nn.Module,
        companions: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Around nn.Module's own attributes: the inner module's arrays are the bank's memory, and
        # must show up neither as parameters nor as layers to quantize.
        object.__setattr__(self, "_streamer", streamer)
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_layout", streamer.store.layers[layer].layout)
        # What the model looks for beside the experts, resident and under its own name.
        for name, module in companions.items():
            self[name] = module

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        streamer: Streamer = self._streamer
        start = time.perf_counter()
        chosen = np.array(indices)  # the one read-back of a layer
        streamer.readback_seconds += time.perf_counter() - start
        experts, slots = np.unique(chosen, return_inverse=True)
        streamer.widest = max(streamer.widest, len(experts))
        if len(experts) <= streamer.bank.lane_slots:
            local = mx.array(slots.reshape(chosen.shape).astype(np.uint32))
            return self._compute(experts.tolist(), x, local)
        return self._in_groups(x, experts.tolist(), slots.reshape(-1), chosen.shape)

    def _compute(self, experts: list[int], x: mx.array, local: mx.array) -> mx.array:
        lane = self._streamer.load(self._layer, experts)
        bind(self._inner, self._layout, lane)
        output: mx.array = self._inner(x, local)
        lane.fence(output)
        return output

    def _in_groups(
        self, x: mx.array, experts: list[int], slots: Any, shape: tuple[int, ...]
    ) -> mx.array:
        """More experts than a lane holds: rows sorted by expert, a lane of experts at a time.

        Every row is computed on its own, so the grouping does not change a bit of it; every
        expert is read once. While a group computes, the next one is read into the other lane.
        """
        k, size = shape[-1], self._streamer.bank.lane_slots
        rows = mx.broadcast_to(x, (*shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        outputs = []
        for first in range(0, len(experts), size):
            low, high = np.searchsorted(ordered, (first, first + size))
            local = mx.array((ordered[low:high] - first).astype(np.uint32))[:, None]
            picked = rows[mx.array((order[low:high] // k).astype(np.uint32))]
            output = self._compute(experts[first : first + size], picked, local)
            mx.async_eval(output)
            outputs.append(output.squeeze(-2))
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        joined = mx.concatenate(outputs)[mx.array(inverse.astype(np.uint32))]
        return joined.reshape(*shape, joined.shape[-1])


def bind(module: nn.Module, layout: Layout, lane: Lane) -> None:
    """Let the projections of mlx-lm's module read from a lane."""
    for name, array in lane.arrays(layout).items():
        projection, param = name.split(".")
        module[projection][param] = array
