"""A block of mlx-lm's whose formula is known: router, experts, and a shared expert if it has one.

Knowing the formula pays twice. Kernels compute the whole block in a few launches; and which experts
a token uses, with which weights and bits, can be an ExpertChoice's instead of the block's own.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from flash_moe.arrays import float32_view
from flash_moe.kernels.interface import Shared
from flash_moe.kernels.spec import MAX_CHOSEN, MAX_EXPERTS, U32
from flash_moe.stream.choice import ExpertChoice, Selection
from flash_moe.stream.precision import Flags
from flash_moe.stream.residency import Residency
from flash_moe.stream.streamed import StreamedLayer, StreamedSwitch, Streamer


class Mixture(nn.Module):
    """Stands where mlx-lm's block stood and holds the block's modules under their own names. A
    family says which block it is; the router here is a softmax over all experts."""

    # The block's module and class in mlx-lm. By exact type: a subclass may compute something else.
    block_type: ClassVar[tuple[str, str]]
    # What the block calls its shared expert and the gate of it, if it has one.
    shared_names: ClassVar[tuple[str, str] | None] = None

    gate: nn.Module
    switch_mlp: StreamedSwitch

    def __init__(self, block: nn.Module, streamer: Streamer, choice: ExpertChoice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name, module in block.children().items():
            self[name] = module
        self.streamer = streamer
        self.choice = choice
        self.residency = Residency(streamer.store)
        self._k, self._ranked, self._needs_host = choice.k, choice.ranked, choice.needs_host
        # Of those that are ranked, how many are looked at: all of them where the host chooses.
        self._routed = choice.ranked if choice.needs_host else choice.k
        self._renormalise = choice.router_renormalises
        self.layer: StreamedLayer = self.switch_mlp.layer
        self.fused = self.layer.spec is not None and self._router_fits(choice)

    @classmethod
    def stands_for(cls, block: nn.Module) -> bool:
        """Whether this is the family of a block whose experts are streamed."""
        kind = type(block)
        return (
            (kind.__module__, kind.__qualname__) == cls.block_type
            and isinstance(block.switch_mlp, StreamedSwitch)
            and block.sharding_group is None
        )

    @classmethod
    def renormalises(cls, block: nn.Module) -> bool:
        """Whether the weights of a token's experts sum to one."""
        return bool(block.norm_topk_prob)

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        y = self._by_kernels(flat) if self.fused else self._by_mlx(flat)
        return y.reshape(x.shape)

    def _by_kernels(self, x: mx.array) -> mx.array:
        """Softmax, top-k and weights are one kernel; down projection, weights, sum and shared
        expert another."""
        kernels = self.streamer.kernels
        assert kernels is not None
        ids, weights = kernels.route(self.gate(x), self._ranked, self._renormalise, self._routed)
        if not kernels.one_hand_over:
            mx.async_eval(ids, weights)
        # Handed over before the read-back: a GPU computes it while the host reads the experts.
        shared = self._shared(x)
        rest = [] if shared.output is None else [shared.output, shared.gate]
        mx.async_eval(ids, weights, *rest)
        chosen, full = self.streamer.read_back(ids), None
        if self._needs_host:
            chosen, host_weights, full = self._select(chosen, weights)
            weights = mx.array(host_weights)
        return self.layer.mixture(x, chosen, weights, shared, full)

    def _by_mlx(self, x: mx.array) -> mx.array:
        """The block's own operations, for experts that no kernel of ours computes."""
        odds = mx.softmax(self.gate(x), axis=-1, precise=True)
        ids = mx.argsort(-odds, axis=-1)[..., : self._ranked]
        weights = mx.take_along_axis(odds, ids, axis=-1)
        if self._renormalise:
            routed = weights[..., : self.choice.routed]
            weights = weights / routed.sum(axis=-1, keepdims=True)
        full: Flags | None = None
        if self._needs_host:
            dtype = weights.dtype
            chosen, host_weights, full = self._select(self.streamer.read_back(ids), weights)
            ids, weights = mx.array(chosen), mx.array(host_weights).astype(dtype)
        else:
            ids, weights = ids[..., : self._k], weights[..., : self._k]
        y = (self.layer.experts(x, ids, full) * weights[..., None]).sum(axis=-2)
        shared = self._shared(x)
        if shared.output is not None and shared.gate is not None:
            y = y + mx.sigmoid(shared.gate) * shared.output
        return y

    def _shared(self, x: mx.array) -> Shared:
        if self.shared_names is None:
            return Shared()
        expert, gate = self.shared_names
        return Shared(output=self[expert](x), gate=self[gate](x))

    def _select(self, ids: U32, weights: mx.array) -> Selection:
        number, residency = self.layer.number, self.residency
        return self.choice.select(
            ids,
            float32_view(weights),
            self.streamer.phase,
            lambda expert, full: residency.cached(number, expert, full),
        )

    def _router_fits(self, choice: ExpertChoice) -> bool:
        experts = self.streamer.store.layers[self.layer.number].experts
        return choice.ranked <= MAX_CHOSEN and experts <= MAX_EXPERTS
