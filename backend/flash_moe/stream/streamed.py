"""The streamed experts: what stands where mlx-lm's SwitchGLU or SwitchMLP stood.

Without kernels it calls mlx-lm's own module, with the bank's slots in the place of the stacked
weights and slot numbers in the place of expert numbers. So the activation, the biases, the sort of
large batches and every quantization mode are mlx-lm's code, and the result is the same (on a CPU to
the bit); only the expert axis is shorter. Layers that our kernels cover are computed by those.

Of a pack in two planes every pair of a token and an expert is computed in full or from the first
plane alone (precision.py). An expert is read in full if one of its pairs needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.kernels.coverage import why_unsupported
from flash_moe.kernels.interface import Kernels, Shared
from flash_moe.kernels.spec import SLOT_MASK, U32, ExpertSpec, expert_spec, inverse
from flash_moe.options import Phase
from flash_moe.stream import planes
from flash_moe.stream.bank import Bank, Lane
from flash_moe.stream.mapping import MappedExperts
from flash_moe.stream.precision import Flags, Precision
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import ExpertStore, Slots

# Hears of the experts that a layer's router chose, for every token and rank.
RoutingObserver = Callable[[int, U32], None]


class Recorder(Protocol):
    """Computes in the place of all layers, for those who measure what goes on inside."""

    def __call__(
        self, layer: StreamedLayer, experts: list[int], x: mx.array, slots: mx.array
    ) -> mx.array:
        """What `layer.switch(x, slots)` gives, whose weights are those of `experts`."""


@dataclass(slots=True)
class Streamer:
    """What all streamed layers of a model share. Used by one thread, the one that evaluates."""

    store: ExpertStore
    reader: Reader
    bank: Bank
    kernels: Kernels | None = None
    # For kernels that compute from any address: those on a CPU.
    mapping: MappedExperts | None = None
    precision: Precision = Precision()
    # What is being computed: precision and the choice of experts depend on it.
    phase: Phase = "prompt"
    observer: RoutingObserver | None = None
    recorder: Recorder | None = None
    # Seconds spent waiting for the router's choice, which includes all computing before it.
    readback_seconds: float = 0.0

    def read_back(self, indices: mx.array) -> U32:
        """The experts that a router chose: the one thing a layer needs on the host."""
        start = time.perf_counter()
        chosen = np.array(indices).astype(np.uint32, copy=False)
        self.readback_seconds += time.perf_counter() - start
        return chosen

    def close(self) -> None:
        """Nothing may be computed from the bank any more."""
        self.reader.close()
        if self.mapping is not None:
            self.mapping.close()
        self.store.close()

    def load(
        self,
        layer: int,
        experts: list[int],
        full: Flags | None = None,
        spec: ExpertSpec | None = None,
    ) -> Lane:
        """Read experts of a layer, in full or their first planes, into the next lane; expert
        `experts[i]` is in slot i. For a kernel of a spec, those that the page cache has stay there
        and have no more than their number in the lane."""
        lane, rest = self.bank.take(experts), None
        self.reader.counters.experts += len(experts)
        if self.mapping is not None and spec is not None:
            rest = self._map(self.mapping, lane, layer, experts, full, spec)
        if rest is None:
            pieces = self.store.pieces(layer, experts, self.bank.stride, full)
        else:
            full = None if full is None else full[rest]
            few = [experts[slot] for slot in rest]
            pieces = self.store.pieces(layer, few, self.bank.stride, full, rest)
        if len(pieces):
            self.reader.read(pieces, lane.buffer)
        return lane

    def _map(
        self,
        mapping: MappedExperts,
        lane: Lane,
        layer: int,
        experts: list[int],
        full: Flags | None,
        spec: ExpertSpec,
    ) -> Slots | None:
        """Lets the lane say where experts are mapped; the slots of those that are not, or None if
        none is."""
        start, counters = time.perf_counter(), self.reader.counters
        there, nbytes = mapping.find(layer, experts, full)
        if nbytes:
            parts = lane.parts(spec).copy()
            parts[there] = mapping.parts(layer, np.array(experts)[there], spec)
            lane.elsewhere = parts
        counters.nbytes += nbytes
        counters.mapped += nbytes
        counters.seconds += time.perf_counter() - start
        return np.flatnonzero(~there) if nbytes else None


class StreamedLayer:
    """The experts of one layer. `switch` is mlx-lm's module, whose projections read from a lane
    of the bank; `spec` is None where no kernel computes the layer."""

    __slots__ = ("_lane_slots", "_two_planes", "layout", "number", "spec", "streamer", "switch")

    def __init__(self, streamer: Streamer, number: int, switch: nn.Module) -> None:
        self.streamer = streamer
        self.number = number
        self.switch = switch
        self.layout = streamer.store.layers[number].layout
        self._two_planes = self.layout.two_planes
        self._lane_slots = streamer.bank.lane_slots
        self.spec: ExpertSpec | None = None
        if streamer.kernels is not None and why_unsupported(switch, self.layout) is None:
            self.spec = expert_spec(self.layout, streamer.bank.stride)

    def experts(self, x: mx.array, indices: mx.array, full: Flags | None = None) -> mx.array:
        """expert_{indices[…, k]}(x[…]) for every pair, [..., k, hidden]."""
        chosen = self.streamer.read_back(indices)
        experts, slots = self._slots(chosen, full)
        if self.spec is None and self._fit(experts):
            return self._compute(experts, x, slots.reshape(chosen.shape))
        # One row a token, where x has one.
        x = mx.broadcast_to(x, (*chosen.shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])
        if len(x) == 1 and self._fit(experts):
            rows = self._rows(x, experts, np.zeros_like(slots), slots)
        else:
            rows, place = self._in_groups(x, experts, slots)
            rows = rows[mx.array(place)]
        return rows.reshape(*chosen.shape, rows.shape[-1])

    def mixture(
        self,
        x: mx.array,
        chosen: U32,
        weights: mx.array,
        shared: Shared,
        full: Flags | None = None,
    ) -> mx.array:
        """The weighted sum of the experts chosen for x [tokens, hidden], and the shared expert:
        by kernels, which must cover the layer."""
        kernels = self.streamer.kernels
        assert kernels is not None
        assert self.spec is not None
        experts, slots = self._slots(chosen, full)
        if not self._fit(experts) or not self._by_kernels(len(slots), len(experts)):
            rows, place = self._in_groups(x, experts, slots)
            return kernels.combine(rows, place, weights, shared, x.dtype)
        lane = self._load(experts, slots, self.spec)
        output = kernels.mixture(lane, self.spec, x, slots.reshape(chosen.shape), weights, shared)
        lane.fence(output)
        return output

    def _fit(self, experts: list[int]) -> bool:
        return len(experts) <= self._lane_slots

    def _by_kernels(self, pairs: int, experts: int) -> bool:
        """Whether kernels compute so many pairs. A recorder looks into mlx-lm's module, so then
        they compute none."""
        kernels = self.streamer.kernels
        if kernels is None or self.spec is None or self.streamer.recorder is not None:
            return False
        return not kernels.prefers_mlx(pairs, experts)

    def _slots(self, chosen: U32, full: Flags | None) -> tuple[list[int], U32]:
        """The experts to read, and for every pair its expert's place among them, marked where it
        is computed in full."""
        if self.streamer.observer is not None:
            self.streamer.observer(self.number, chosen)
        experts, slots = _places(chosen)
        if self._two_planes:
            everything = self.streamer.precision.all_full(self.streamer.phase)
            slots = planes.mark_full(slots, everything if full is None else full.ravel())
        return experts, slots

    def _load(self, experts: list[int], slots: U32, spec: ExpertSpec | None = None) -> Lane:
        full: Flags | None = None
        if self._two_planes:
            full = planes.experts_in_full(slots, len(experts))
        return self.streamer.load(self.number, experts, full, spec)

    def _compute(self, experts: list[int], x: mx.array, slots: U32) -> mx.array:
        lane = self._load(experts, slots)
        output = self._by_mlx(experts, lane.arrays(self.layout), x, slots)
        lane.fence(output)
        return output

    def _by_mlx(
        self, experts: list[int], arrays: Mapping[str, mx.array], x: mx.array, slots: U32
    ) -> mx.array:
        if self._two_planes:
            return planes.compute(self.switch, self.layout, arrays, x, slots)
        bind(self.switch, arrays)
        if self.streamer.recorder is not None:
            return self.streamer.recorder(self, experts, x, mx.array(slots))
        output: mx.array = self.switch(x, mx.array(slots))
        return output

    def _rows(self, x: mx.array, experts: list[int], tokens: U32, slots: U32) -> mx.array:
        """expert_{slots[i]}(x[tokens[i]]) for every i; the experts fit in a lane."""
        kernels = self.streamer.kernels
        if kernels is None or self.spec is None or not self._by_kernels(len(slots), len(experts)):
            return self._compute(experts, x[mx.array(tokens)], slots[:, None]).squeeze(-2)
        lane = self._load(experts, slots, self.spec)
        rows = kernels.rows(lane, self.spec, x, tokens, slots)
        lane.fence(rows)
        return rows

    def _in_groups(self, x: mx.array, experts: list[int], slots: U32) -> tuple[mx.array, U32]:
        """Pairs sorted by expert, a lane of experts at a time; and where each pair's row is then.

        Every row is computed on its own, so the grouping does not change a bit of it; every
        expert is read once. Where computing is lazy, the next group is read while one computes.
        """
        size, k = self._lane_slots, len(slots) // len(x)
        order = np.argsort(planes.sort_key(slots), kind="stable").astype(np.uint32)
        ordered = slots[order]
        outputs = []
        for first in range(0, len(experts), size):
            low, high = np.searchsorted(ordered & SLOT_MASK, (first, first + size))
            group, tokens = experts[first : first + size], order[low:high] // k
            output = self._rows(x, group, tokens, ordered[low:high] - first)
            mx.async_eval(output)
            outputs.append(output)
        return mx.concatenate(outputs), inverse(order)


class StreamedSwitch(nn.Module):
    """`(x [..., H], indices [..., k]) → [..., k, H]`: the module that mlx-lm's model calls. The
    layer is no part of the module's tree: its arrays are the bank's memory, and must show up
    neither as parameters nor as matrices to quantize. `companions` are resident modules that the
    model looks for beside the experts."""

    layer: StreamedLayer

    def __init__(
        self, layer: StreamedLayer, companions: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        for name, module in (companions or {}).items():
            self[name] = module

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self.layer.experts(x, indices)


def _places(chosen: U32) -> tuple[list[int], U32]:
    """Distinct experts, and for every choice its expert's place among them."""
    flat = chosen.reshape(-1)
    if len(flat) == chosen.shape[-1]:
        # One token: its experts are distinct. 1 µs a layer, against 15.
        experts = flat.tolist()
        if len(set(experts)) == len(experts):
            return experts, np.arange(len(experts), dtype=np.uint32)
    distinct, places = np.unique(flat, return_inverse=True)
    return distinct.tolist(), places.reshape(-1).astype(np.uint32)


def bind(switch: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Let the projections of mlx-lm's module read from a lane."""
    for name, array in arrays.items():
        projection, param = name.split(".")
        switch[projection][param] = array
