"""A model's plan in words, for the commands that show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_flash_moe.errors import printable

if TYPE_CHECKING:
    from flash_moe import Checkpoint

# The engine's Plan, which is not at its door: nobody outside makes one.
Plan = Any


def describe(name: str, checkpoint: Checkpoint, experts: int | None = None) -> str:
    return describe_plan(name, checkpoint.plan(experts))


def describe_plan(name: str, plan: Plan, rate: float | None = None) -> str:
    """`rate`: bytes a second of the disk that it is on, where that was measured."""
    own = plan.own_experts_per_token
    k = f"{plan.experts_per_token} a token"
    if plan.experts_per_token != own:
        k += f" (the model's own number is {own}: faster, less exact)"
    changed = f"  less exact: {plan.requantized}\n" if plan.requantized else ""
    first = ""
    if plan.first_plane_bytes is not None:
        changed = f"  {plan.requantized}\n"
        first = f", of which a first plane is {size(plan.first_plane_bytes)}"
    disk = "5 GB/s" if rate is None else f"this disk's {rate / 1e9:.1f} GB/s"
    text = (
        f"{name}: {plan.architecture}, {plan.bits}, {plan.form}\n"
        f"  experts   {plan.experts} in each of {plan.layers} layers, {k}\n"
        f"{changed}"
        f"  on disk   {size(plan.expert_bytes)} of experts, {size(plan.record_bytes)} each{first}\n"
        f"  in memory {size(plan.resident_bytes)} of weights, {size(plan.bank_bytes)} bank\n"
        f"  a token   reads up to {size(plan.token_bytes)}: at {disk} and nothing cached "
        f"{plan.tokens_per_second(rate or 5e9):,.1f} tokens/s at most"
    )
    return printable(text)


def size(nbytes: int) -> str:
    if nbytes < 1e6:
        return f"{nbytes / 1e3:.0f} kB"
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
