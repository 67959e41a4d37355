"""The streamed experts: a module that stands where mlx-lm's SwitchGLU or SwitchMLP stood.

Without kernels it keeps mlx-lm's own module and calls it, with the bank's slots in the place of
the stacked weights and slot numbers in the place of expert numbers. So the activation, the biases,
the sort of large batches and every quantization mode are mlx-lm's code, and the result is the same
(on a CPU to the bit); only the expert axis is shorter. With kernels, the layers that they cover are
theirs.

Of a pack in two planes, `whole` says for every pair of a token and an expert whether it is computed
from both or from the first alone; of any other, it says nothing. An expert is read whole if one of
its pairs needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.format.layout import Layout
from flash_moe.kernels.backends import Kernels, inverse
from flash_moe.kernels.coverage import expert_spec
from flash_moe.kernels.gpu import U32, Extras
from flash_moe.kernels.spec import ExpertSpec
from flash_moe.stream import planes
from flash_moe.stream.bank import Bank, Lane
from flash_moe.stream.choice import Occasion, Whole
from flash_moe.stream.planes import PLACE, by_expert
from flash_moe.stream.reader import Reader, Target
from flash_moe.stream.store import ExpertStore


@dataclass(slots=True)
class Streamer:
    """What all streamed layers of a model share. Used by one thread, the one that evaluates."""

    store: ExpertStore
    reader: Reader
    bank: Bank
    kernels: Kernels | None = None
    # Seconds spent waiting for the router's choice, which includes all computing before it.
    readback_seconds: float = 0.0
    # Seconds spent waiting for a lane's last output, which is computing too.
    fence_seconds: float = 0.0
    # Experts asked for in one layer of one call, at most: what a bigger bank would serve at once.
    widest: int = field(default=0)
    # What is being computed: some choices of experts depend on it.
    occasion: Occasion = "prompt"
    # Told of the experts that every layer's router chose, while somebody counts them.
    watch: Callable[[int, U32], None] | None = None
    # Computes in the place of mlx-lm's module, while somebody measures what goes on inside of it.
    record: Callable[[int, list[int], nn.Module, mx.array, mx.array], mx.array] | None = None
    # What pairs are computed from where nobody says it: both planes, or the first; and when both.
    whole: bool = True
    whole_in: tuple[Occasion, ...] = ()

    @property
    def all_whole(self) -> bool:
        return self.whole or self.occasion in self.whole_in

    def read_back(self, indices: mx.array) -> U32:
        """The experts that a router chose: the one thing a layer needs on the host."""
        start = time.perf_counter()
        chosen = np.array(indices).astype(np.uint32, copy=False)
        self.readback_seconds += time.perf_counter() - start
        return chosen

    def load(self, layer: int, experts: list[int], whole: Iterable[bool] = repeat(True)) -> Lane:
        """Read experts of a layer, or their first planes, into the next lane; expert `experts[i]`
        is in slot i."""
        start = time.perf_counter()
        lane = self.bank.take(experts)
        self.fence_seconds += time.perf_counter() - start
        targets: list[Target] = []
        for expert, buffer, both in zip(experts, lane.buffers, whole, strict=False):
            for segment in self.store.segments(layer, expert, both):
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
        layout = streamer.store.layers[layer].layout
        object.__setattr__(self, "_layout", layout)
        object.__setattr__(self, "_spec", covered_spec(streamer, layout, inner))
        # What the model looks for beside the experts, resident and under its own name.
        for name, module in companions.items():
            self[name] = module

    @property
    def layer(self) -> int:
        return int(self._layer)

    @property
    def fused(self) -> bool:
        """Whether kernels compute this layer, rather than MLX's operations."""
        return self._spec is not None

    def __call__(self, x: mx.array, indices: mx.array, whole: Whole = None) -> mx.array:
        chosen = self._streamer.read_back(indices)
        experts, slots = self._slots(chosen, whole)
        if not self.fused and self._fit(experts):
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
        extras: Extras,
        whole: Whole = None,
    ) -> mx.array:
        """The weighted sum of the experts chosen for x [tokens, hidden], and extras: by kernels."""
        kernels: Kernels = self._streamer.kernels
        experts, slots = self._slots(chosen, whole)
        if not self._fit(experts) or kernels.prefers_mlx(len(slots), len(experts)):
            rows, place = self._in_groups(x, experts, slots)
            return kernels.combine(rows, place, weights, extras, x.dtype)
        lane = self._load(experts, slots)
        local = slots.reshape(chosen.shape)
        output = kernels.mixture(lane, self._spec, x, local, weights, extras)
        lane.fence(output)
        return output

    def _fit(self, experts: list[int]) -> bool:
        return len(experts) <= int(self._streamer.bank.lane_slots)

    def _slots(self, chosen: U32, whole: Whole) -> tuple[list[int], U32]:
        """The experts to read, and for every (token, choice) pair its expert's place among them,
        marked where it is computed from both planes."""
        if self._streamer.watch is not None:
            self._streamer.watch(self._layer, chosen)
        experts, places = np.unique(chosen, return_inverse=True)
        self._streamer.widest = max(self._streamer.widest, len(experts))
        slots = places.reshape(-1).astype(np.uint32)
        if self._layout.planes:
            slots = planes.marked(
                slots, self._streamer.all_whole if whole is None else whole.ravel()
            )
        return experts.tolist(), slots

    def _load(self, experts: list[int], slots: U32) -> Lane:
        whole: Iterable[bool] = repeat(True)
        if self._layout.planes:
            whole = planes.wanted_whole(slots, len(experts))
        lane: Lane = self._streamer.load(self._layer, experts, whole)
        return lane

    def _compute(self, experts: list[int], x: mx.array, slots: U32) -> mx.array:
        lane = self._load(experts, slots)
        output = self._by_mlx(experts, lane.arrays(self._layout), x, slots)
        lane.fence(output)
        return output

    def _by_mlx(
        self, experts: list[int], arrays: Mapping[str, mx.array], x: mx.array, slots: U32
    ) -> mx.array:
        if self._layout.planes:
            return planes.compute(self._inner, self._layout, arrays, x, slots)
        bind(self._inner, arrays)
        record = self._streamer.record
        output: mx.array = (
            record(self._layer, experts, self._inner, x, mx.array(slots))
            if record
            else self._inner(x, mx.array(slots))
        )
        return output

    def _rows(self, x: mx.array, experts: list[int], tokens: U32, slots: U32) -> mx.array:
        """expert_{slots[i]}(x[tokens[i]]) for every i; the experts fit in a lane."""
        kernels: Kernels | None = self._streamer.kernels
        if not self.fused or kernels is None or kernels.prefers_mlx(len(slots), len(experts)):
            return self._compute(experts, x[mx.array(tokens)], slots[:, None]).squeeze(-2)
        lane = self._load(experts, slots)
        rows = kernels.rows(lane, self._spec, x, tokens, slots)
        lane.fence(rows)
        return rows

    def _in_groups(self, x: mx.array, experts: list[int], slots: U32) -> tuple[mx.array, U32]:
        """Pairs sorted by expert, a lane of experts at a time; and where each pair's row is then.

        Every row is computed on its own, so the grouping does not change a bit of it; every
        expert is read once. Where computing is lazy, the next group is read while one computes.
        """
        size, k = self._streamer.bank.lane_slots, len(slots) // len(x)
        order = np.argsort(by_expert(slots), kind="stable").astype(np.uint32)
        ordered = slots[order]
        outputs = []
        for first in range(0, len(experts), size):
            low, high = np.searchsorted(ordered & PLACE, (first, first + size))
            group, tokens = experts[first : first + size], order[low:high] // k
            output = self._rows(x, group, tokens, ordered[low:high] - first)
            mx.async_eval(output)
            outputs.append(output)
        return mx.concatenate(outputs), inverse(order)


def covered_spec(streamer: Streamer, layout: Layout, inner: nn.Module) -> ExpertSpec | None:
    """What the kernels need to know of a layer, if there are kernels and they cover it."""
    from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

    # By exact type: a subclass may compute something else.
    covered = type(inner) is SwitchGLU and type(inner.activation) is SwiGLU
    if streamer.kernels is None or not covered:
        return None
    return expert_spec(layout, streamer.bank.stride)


def bind(module: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Let the projections of mlx-lm's module read from a lane."""
    for name, array in arrays.items():
        projection, param = name.split(".")
        module[projection][param] = array
