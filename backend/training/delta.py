"""The gated delta rule in chunks of 64 tokens, in plain PyTorch, and the convolution before it.

Within a chunk everything is products of matrices; from chunk to chunk one small state is handed
on. The kernels of flash-linear-attention would do the same quicker, but refuse to run with the
Triton of this PyTorch on Hopper GPUs, where it computes their gradient wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 64
BLOCK = 16


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """q, k [batch, time, key heads, width], v [batch, time, heads, width], g = log of the decay."""
    _batch, time, heads, _width = v.shape
    q, k = (_unit(x).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    q, k, v = (_chunks(x) for x in (q, k, v))
    g, beta = (_chunks(x.float().unsqueeze(-1)).squeeze(-1) for x in (g, beta))

    total = g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    fade = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp()
    gain = beta.unsqueeze(-1)
    mixed = (k.float() * gain).to(k.dtype) @ k.mT
    inverse = _Inverse.apply((mixed.float() * fade).tril(-1)).to(k.dtype)
    fresh = inverse @ (v.float() * gain).to(v.dtype)
    seen = inverse @ (k.float() * (gain * total.exp().unsqueeze(-1))).to(k.dtype)
    last = total[..., -1:]
    kept = (k.float() * (last - total).exp().unsqueeze(-1)).to(k.dtype)
    states, fresh = _scan(seen, fresh, kept, last.exp().unsqueeze(-1))

    near = ((q @ k.mT).float() * fade).to(v.dtype)
    far = (q.float() * total.exp().unsqueeze(-1)).to(v.dtype)
    out = far @ states + near @ fresh
    return _rows(out, time), None


def _unit(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _chunks(x: torch.Tensor) -> torch.Tensor:
    """[batch, time, heads, width] to [batch, heads, chunks, CHUNK, width]."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)


def _rows(x: torch.Tensor, time: int) -> torch.Tensor:
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :time]


@torch.compiler.disable
def _scan(
    seen: torch.Tensor, fresh: torch.Tensor, kept: torch.Tensor, fade: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before each chunk, and what each chunk adds to it. Not compiled: 32 steps
    unrolled compile for minutes, and run as quickly as they are launched."""
    state = seen.new_zeros((*seen.shape[:2], seen.shape[-1], fresh.shape[-1]), dtype=torch.float32)
    states, news = [], []
    # Unbound, not indexed: the gradient of an index is a whole tensor of zeros a step.
    for w, u, k, f in zip(*(x.unbind(2) for x in (seen, fresh, kept, fade)), strict=True):
        narrow = state.to(seen.dtype)
        new = u - w @ narrow
        state = state * f + k.mT @ new
        states.append(narrow)
        news.append(new)
    return torch.stack(states, 2), torch.stack(news, 2)


class _Inverse(torch.autograd.Function):
    """(1 + lower)^-1 of strictly lower triangular matrices, in float32."""

    @staticmethod
    def forward(ctx: Any, lower: torch.Tensor) -> Any:
        inverse = _inverse(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    """By blocks. Powers of a whole chunk would cancel: with equal keys they reach 10^18."""
    size = lower.shape[-1]
    if size == BLOCK:
        one = torch.eye(BLOCK, device=lower.device)
        power, inverse = -lower, one - lower
        for _ in range(3):
            power = power @ power
            inverse = inverse + inverse @ power
        return inverse
    half = size // 2
    first, second = _inverse(lower[..., :half, :half]), _inverse(lower[..., half:, half:])
    corner = -second @ lower[..., half:, :half] @ first
    top = torch.cat([first, torch.zeros_like(first)], -1)
    return torch.cat([top, torch.cat([corner, second], -1)], -2)


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: None, activation: str | None = None, **_: Any
) -> torch.Tensor:
    """x [batch, channels, time]: four products a channel. cuDNN's gradient of it is slow."""
    width, time = weight.shape[-1], x.shape[-1]
    padded = F.pad(x, (width - 1, 0))
    out = sum(padded[..., i : i + time] * weight[:, i, None] for i in range(width))
    return F.silu(out)
