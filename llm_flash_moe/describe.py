"""What the commands say about a model, in words for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash_moe.checkpoint.plan import Plan
    from flash_moe.pack.calibrate import Calibration, Measured
    from flash_moe.pack.recast import Change


def plan_of(path: Path, experts: int | None) -> Plan:
    """What a folder is and needs, from its headers."""
    from flash_moe.checkpoint.folder import experts_per_token, open_folder
    from flash_moe.checkpoint.plan import make_plan
    from flash_moe.checkpoint.skeleton import open_skeleton

    folder = open_folder(path)
    if experts is None and folder.manifest is not None:
        experts = folder.manifest.experts_per_token
    skeleton = open_skeleton(folder, experts)
    skeleton.layers()
    return make_plan(skeleton, experts_per_token(folder.config) or 1)


def describe(name: str, plan: Plan) -> str:
    own = plan.own_experts_per_token
    k = f"{plan.experts_per_token} a token"
    if plan.experts_per_token != own:
        k += f" (fewer than the model's own {own}: faster, less exact)"
    changed = f"  less exact: {plan.requantized}\n" if plan.requantized else ""
    first = ""
    if plan.first_bytes is not None:
        changed = f"  {plan.requantized}\n"
        first = f", of which a first plane is {size(plan.first_bytes)}"
    return (
        f"{name}: {plan.architecture}, {plan.bits}, {plan.form}\n"
        f"  experts   {plan.experts} in each of {plan.layers} layers, {k}\n"
        f"{changed}"
        f"  on disk   {size(plan.expert_bytes)} of experts, {size(plan.record_bytes)} each{first}\n"
        f"  in memory {size(plan.resident_bytes)} of weights, {size(plan.bank_bytes)} bank\n"
        f"  a token   reads up to {size(plan.token_bytes)}: at 5 GB/s and nothing cached "
        f"{plan.tokens_per_second(5e9):,.1f} tokens/s at most"
    )


def describe_quantizing(change: Change) -> str:
    from flash_moe.decode.statistics import peak_rss

    spent = change.spent
    return (
        f"Quantized {size(spent.nbytes)} of experts ({change.how}) at "
        f"{spent.nbytes / spent.cpu_seconds / 1e9:.2g} GB/s a core, "
        f"{spent.nbytes / spent.seconds / 1e9:.2g} GB/s in all; "
        f"peak memory {size(peak_rss())}"
    )


def describe_calibrating(calibration: Calibration, measured: Measured) -> str:
    missed = measured.unreached
    rest = f", which missed {missed:,} of {measured.experts:,} experts" if missed else ""
    return f"Calibrated with {len(calibration.ids):,} tokens{rest}."


def size(nbytes: int) -> str:
    if nbytes < 1e6:
        return f"{nbytes / 1e3:.0f} kB"
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
