"""The network in PyTorch: transformers' own Qwen3.5-MoE, with the parts made quick that cost.

The experts run as two grouped products over rows sorted by expert, the gated delta rule in chunks
(delta.py). Everything else is transformers' code, so what is trained is the architecture that
mlx-lm runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from training.delta import convolve, delta_rule
from training.shape import TEXT_CONFIG


def make_network(device: str, **changes: Any) -> qwen.Qwen3_5MoeForCausalLM:
    settings = {key: value for key, value in TEXT_CONFIG.items() if key != "model_type"}
    config = Qwen3_5MoeTextConfig(**(settings | {"use_cache": False} | changes))
    qwen.Qwen3_5MoeExperts.forward = sorted_experts
    qwen.Qwen3_5MoeTopKRouter.forward = route
    qwen.torch_chunk_gated_delta_rule = delta_rule
    qwen.causal_conv1d_fn = convolve
    model = qwen.Qwen3_5MoeForCausalLM._from_config(config, attn_implementation="sdpa")
    for module in model.modules():
        if isinstance(module, qwen.Qwen3_5MoeGatedDeltaNet):
            _remember_long(module)
    return model.to(device=device, dtype=torch.bfloat16)


def _remember_long(module: Any) -> None:
    """Steps of 0.001 to 0.1, as Mamba-2 starts them. transformers' ones forget within a token:
    made to be overwritten by a checkpoint, not to learn from."""
    with torch.no_grad():
        step = torch.exp(torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(0.1)))
        module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        module.A_log.copy_(torch.empty_like(module.A_log).uniform_(1, 16).log())


class _Spread(torch.autograd.Function):
    """Every row k times, sorted by expert. The plain index would add up its gradient atomically:
    slow, and another sum each time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor, k: int) -> Any:
        ctx.save_for_backward(back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad[back].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, to: torch.Tensor, back: torch.Tensor) -> Any:
        ctx.save_for_backward(back)
        return x[to]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad[back], None, None


def sorted_experts(
    self: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    k = chosen.shape[-1]
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    ends = torch.cumsum(torch.histc(flat.float(), self.num_experts, 0, self.num_experts - 1), 0).to(
        torch.int32
    )
    rows = _Spread.apply(x, order, back, k)
    gate, up = _grouped(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
    out = _grouped(torch.nn.functional.silu(gate) * up, self.down_proj, ends)
    out = _Permute.apply(out, back, order).view(-1, k, x.shape[-1])
    return (out * weights.unsqueeze(-1)).sum(1)


def _grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends)


def route(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """transformers' router, in float32, keeping what the balance is computed from."""
    logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    odds = torch.softmax(logits.float(), dim=-1)
    top, chosen = torch.topk(odds, self.top_k, dim=-1)
    used = torch.histc(chosen.float(), self.num_experts, 0, self.num_experts - 1)
    used = used / chosen.numel()
    # 1 where all experts are used alike, each layer for itself: 64 × Σ use × mean probability.
    self.balance = self.num_experts * (used * odds.mean(0)).sum()
    self.used = used
    return logits, (top / top.sum(-1, keepdim=True)).to(logits.dtype), chosen


def routers(model: torch.nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, qwen.Qwen3_5MoeTopKRouter)]
