"""Qwen3.5's linear attention on a GPU: two shaders in the place of 20 of MLX's launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_moe.kernels.gpu import LANES
from flash_moe.kernels.gpu_operations import Gates, gated_delta_raw, short_conv
from flash_moe.kernels.shaders import GpuKind

BLOCK = ("mlx_lm.models.qwen3_5", "GatedDeltaNet")
FUSED = "FusedGatedDeltaNet"


def fuse(module: nn.Module, kind: GpuKind) -> bool:
    """Let shaders compute a module, if it is such a block; whether it is. By exact type: a subclass
    may compute something else."""
    own = type(module)
    if (own.__module__, own.__qualname__) != BLOCK or module.head_k_dim % LANES:
        return False
    module.__class__ = _fused(own, kind)
    return True


def is_fused(module: nn.Module) -> bool:
    return type(module).__name__ == FUSED


def unfuse(module: nn.Module) -> None:
    """Back to mlx-lm's own."""
    module.__class__ = type(module).__mro__[1]


def own_call(module: nn.Module) -> Callable[..., mx.array]:
    """What mlx-lm computes in the place of a fused module."""
    own: Any = type(module).__mro__[1]
    return partial(own.__call__, module)


@cache
def _fused(own: Any, kind: GpuKind) -> type:
    def call(
        self: Any, inputs: mx.array, mask: mx.array | None = None, cache: Any = None
    ) -> mx.array:
        batch, tokens, _ = inputs.shape
        known = cache is not None and cache.lengths is None and batch == 1 and mask is None
        # For a prompt, mlx-lm has a kernel of its own on Metal that is made for many tokens.
        if not known or self.sharding_group is not None or (kind == "metal" and tokens > 1):
            y: mx.array = own.__call__(self, inputs, mask, cache)
            return y
        past, state = cache[0], cache[1]
        if past is None:
            past = mx.zeros((1, self.conv_kernel_size - 1, self.conv_dim), inputs.dtype)
        if state is None:
            state = mx.zeros((1, self.num_v_heads, self.head_v_dim, self.head_k_dim))
        mixed, cache[0] = short_conv(kind, self.in_proj_qkv(inputs), past, self.conv1d.weight)
        rows, cache[1] = gated_delta_raw(
            kind,
            mixed,
            self.in_proj_a(inputs),
            self.in_proj_b(inputs),
            Gates(self.A_log, self.dt_bias),
            state,
            self.num_k_heads,
        )
        cache.advance(tokens)
        z = self.in_proj_z(inputs).reshape(rows.shape)
        y = self.out_proj(self.norm(rows, z).reshape(1, tokens, -1))
        return y

    return type(FUSED, (own,), {"__call__": call})
