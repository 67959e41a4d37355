"""The whole mixture of Qwen3-Next and Qwen3.5: router, experts, shared expert.

Stands where mlx-lm's block stood and holds the block's own modules under their own names. The
formula is the block's; which experts a token uses, and with which weights, is a Choice's.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.kernels.gpu import U32, Extras
from flash_moe.stream.choice import Choice, Chosen, Whole
from flash_moe.stream.residency import Residency
from flash_moe.stream.streamed import Streamer


class _Mixture(nn.Module):
    def __init__(self, block: nn.Module, streamer: Streamer, choice: Choice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name, module in block.children().items():
            self[name] = module
        object.__setattr__(self, "_streamer", streamer)
        object.__setattr__(self, "_choice", choice)
        object.__setattr__(self, "_residency", Residency(streamer.store))
        # With candidates to choose among, shares of all the probability are wanted.
        object.__setattr__(self, "_sums_to_one", choice.renormalise and not choice.prefer_cached)

    def _settled(self, ids: U32, weights: mx.array) -> Chosen:
        layer, residency = self.switch_mlp.layer, self._residency
        chosen: Chosen = self._choice.settle(
            ids,
            np.array(weights, copy=False),
            self._streamer.occasion,
            lambda expert, whole: residency.cached(layer, expert, whole),
        )
        return chosen


class PlainMixture(_Mixture):
    """By MLX's operations, for experts that no kernel of ours computes."""

    def __call__(self, x: mx.array) -> mx.array:
        choice: Choice = self._choice
        odds = mx.softmax(self.gate(x), axis=-1, precise=True)
        ids = mx.argsort(-odds, axis=-1)[..., : choice.ranked]
        weights = mx.take_along_axis(odds, ids, axis=-1)
        if self._sums_to_one:
            weights = weights / weights[..., : choice.routed].sum(axis=-1, keepdims=True)
        ids, weights, whole = self._chosen(ids, weights)
        y: mx.array = (self.switch_mlp(x, ids, whole) * weights[..., None]).sum(axis=-2)
        y += mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y

    def _chosen(self, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array, Whole]:
        k = self._choice.k
        if not self._choice.needs_host:
            return ids[..., :k], weights[..., :k], None
        flat = self._streamer.read_back(ids.reshape(-1, ids.shape[-1]))
        odds = weights.astype(mx.float32).reshape(-1, ids.shape[-1])
        chosen, shape = self._settled(flat, odds), (*ids.shape[:-1], k)
        settled = mx.array(chosen.weights).astype(weights.dtype).reshape(shape)
        whole = None if chosen.whole is None else chosen.whole.reshape(shape)
        return mx.array(chosen.ids).reshape(shape), settled, whole


class StreamedMixture(_Mixture):
    """In few launches: softmax, top-k and weights are one kernel, and down projection, weights, sum
    and shared expert another."""

    def __call__(self, x: mx.array) -> mx.array:
        streamer: Streamer = self._streamer
        choice: Choice = self._choice
        assert streamer.kernels is not None
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = streamer.kernels.route(self.gate(flat), choice.ranked, self._sums_to_one)
        if choice.ranked > choice.k and not choice.needs_host:  # the largest come first
            ids, weights = (mx.contiguous(part[:, : choice.k]) for part in (ids, weights))
        mx.async_eval(ids, weights)
        # Asked for before the read-back: a GPU computes it while the host reads the experts.
        extras = Extras(shared=self.shared_expert(flat), gate=self.shared_expert_gate(flat))
        mx.async_eval(extras.shared, extras.gate)
        chosen, whole = streamer.read_back(ids), None
        if choice.needs_host:
            chosen, settled, whole = self._settled(chosen, weights)
            weights = mx.array(settled)
        y: mx.array = self.switch_mlp.mixture(flat, chosen, weights, extras, whole)
        return y.reshape(x.shape)
