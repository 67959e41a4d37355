"""The whole mixture of Qwen3-Next and Qwen3.5: router, experts, shared expert.

Stands where mlx-lm's block stood and holds the block's own modules under their own names. The
formula is the block's, but for one choice: where fewer experts are used than the model was trained
with (`routed`), those that remain can keep the weights they had among all of them.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from flash_moe.experts.streamed import Streamer
from flash_moe.kernels.gpu import Extras


class _Mixture(nn.Module):
    def __init__(self, block: nn.Module, streamer: Streamer, routed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name, module in block.children().items():
            self[name] = module
        object.__setattr__(self, "_streamer", streamer)
        object.__setattr__(self, "_k", block.top_k)
        object.__setattr__(self, "_routed", routed)
        object.__setattr__(self, "_renormalise", block.norm_topk_prob)


class PlainMixture(_Mixture):
    """By MLX's operations, for experts that no kernel of ours computes."""

    def __call__(self, x: mx.array) -> mx.array:
        odds = mx.softmax(self.gate(x), axis=-1, precise=True)
        ids = mx.argsort(-odds, axis=-1)[..., : self._routed]
        weights = mx.take_along_axis(odds, ids, axis=-1)
        if self._renormalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        ids, weights = ids[..., : self._k], weights[..., : self._k]
        y: mx.array = (self.switch_mlp(x, ids) * weights[..., None]).sum(axis=-2)
        y += mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y


class StreamedMixture(_Mixture):
    """In few launches: softmax, top-k and weights are one kernel, and down projection, weights, sum
    and shared expert another."""

    def __call__(self, x: mx.array) -> mx.array:
        streamer: Streamer = self._streamer
        assert streamer.kernels is not None
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = streamer.kernels.route(self.gate(flat), self._routed, self._renormalise)
        if self._routed > self._k:  # the largest come first
            ids, weights = (mx.contiguous(part[:, : self._k]) for part in (ids, weights))
        mx.async_eval(ids, weights)
        # Asked for before the read-back: a GPU computes it while the host reads the experts.
        extras = Extras(shared=self.shared_expert(flat), gate=self.shared_expert_gate(flat))
        mx.async_eval(extras.shared, extras.gate)
        chosen = streamer.read_back(ids)
        y: mx.array = self.switch_mlp.mixture(flat, chosen, weights, extras)
        return y.reshape(x.shape)
