"""The whole mixture of Qwen3-Next and Qwen3.5 in few launches: router, experts, shared expert.

Stands where mlx-lm's block stood and holds the block's own modules under their own names. The
formula is the block's; what is fused is softmax, top-k and weights in one kernel, and down
projection, weights, sum and shared expert in another.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from flash_moe.experts.streamed import Streamer
from flash_moe.kernels.gpu import Extras


class StreamedMixture(nn.Module):
    def __init__(self, block: nn.Module, streamer: Streamer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name, module in block.children().items():
            self[name] = module
        object.__setattr__(self, "_streamer", streamer)
        object.__setattr__(self, "_k", block.top_k)
        object.__setattr__(self, "_renormalise", block.norm_topk_prob)

    def __call__(self, x: mx.array) -> mx.array:
        streamer: Streamer = self._streamer
        assert streamer.kernels is not None
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = streamer.kernels.route(self.gate(flat), self._k, self._renormalise)
        mx.async_eval(ids, weights)
        # Asked for before the read-back: a GPU computes it while the host reads the experts.
        extras = Extras(shared=self.shared_expert(flat), gate=self.shared_expert_gate(flat))
        mx.async_eval(extras.shared, extras.gate)
        chosen = streamer.read_back(ids)
        y: mx.array = self.switch_mlp.mixture(flat, chosen, weights, extras)
        return y.reshape(x.shape)
