"""A model ready to run: mlx-lm's modules with resident weights, experts on disk.

Owns the store, the reader and the bank, and closes them. Arrays are evaluated in the thread that
loads; the same thread must run the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from flash_moe.checkpoint.folder import experts_per_token, open_folder
from flash_moe.checkpoint.plan import BANK_BYTES, Plan, make_plan
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.checkpoint.switches import companions
from flash_moe.errors import FlashMoeError, OptionError
from flash_moe.kernels.backends import make_kernels
from flash_moe.kernels.runtime import Runtime, choose
from flash_moe.model.install import heads, knows_formula, renormalises, take_over
from flash_moe.stream.bank import Bank
from flash_moe.stream.choice import Choice, Occasion
from flash_moe.stream.reader import DEFAULT_CHUNK, DEFAULT_THREADS, Reader
from flash_moe.stream.store import ExpertLayer, ExpertStore, Mode
from flash_moe.stream.streamed import StreamedSwitch, Streamer

Progress = Callable[[int, int], None]

# Resident weights are evaluated this much at a time, so that progress moves and Ctrl-C works.
LOAD_STEP_BYTES = 64 << 20


# What the weights of experts are when fewer are used than the model was trained with: those among
# all of them, or made to sum up to one again, as mlx-lm does it. Kept ones are better at four of
# ten (backend/benchmarks/fewer-experts.md); `auto` keeps them where we know the formula.
Weights = Literal["auto", "keep", "renormalise"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run a model. `experts` to `whole_in` change results (flash_moe.stream.choice says
    how), `runtime` only their rounding; the rest changes nothing but speed and memory."""

    experts: int | None = None
    weights: Weights = "auto"
    skip_below: float = 0.0
    prefer_cached: float = 0.0
    whole: int | None = None
    whole_in: tuple[Occasion, ...] = ()
    runtime: str = "auto"
    bank_bytes: int = BANK_BYTES
    threads: int = DEFAULT_THREADS
    chunk: int = DEFAULT_CHUNK
    mode: Mode = "buffered"


@dataclass(slots=True)
class StreamedModel:
    model: nn.Module
    config: dict[str, Any]
    path: Path
    plan: Plan
    streamer: Streamer
    runtime: Runtime
    load_seconds: float
    _thread: int = field(default_factory=threading.get_ident)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if threading.get_ident() != self._thread:
            raise FlashMoeError("A loaded model runs in the thread that loaded it.")
        logits: mx.array = self.model(tokens, cache=cache)
        return logits

    def advance(self, tokens: mx.array, cache: list[Any]) -> None:
        """Take tokens into the cache, without their logits: of 512 tokens of the 397B, those would
        be 0.5 GB and, computed eagerly, most of the time."""
        skipped = heads(self.model)
        for head in skipped:
            head.skipped = True
        try:
            self(tokens, cache=cache)
        finally:
            for head in skipped:
                head.skipped = False
        mx.eval([layer.state for layer in cache])

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        cache: list[Any] = make_prompt_cache(self.model)
        return cache

    def close(self) -> None:
        try:
            self.streamer.bank.drain()
        finally:
            self.streamer.reader.close()
            self.streamer.store.close()


def load(
    path: Path, settings: Settings = Settings(), progress: Progress = lambda done, total: None
) -> StreamedModel:
    """Open a checkpoint folder or a pack and bring its resident weights, and only those, in."""
    start = time.perf_counter()
    runtime = choose(settings.runtime)
    folder = open_folder(path)
    chosen = settings.experts
    if chosen is None and folder.manifest is not None:
        chosen = folder.manifest.experts_per_token
    skeleton = open_skeleton(folder, chosen)
    layers = skeleton.layers()
    _require_computable(runtime, layers)
    own = experts_per_token(folder.config) or 1
    plan = make_plan(skeleton, own, settings.bank_bytes)
    streamer = Streamer(
        ExpertStore(layers, settings.mode),
        Reader(settings.threads, settings.chunk),
        Bank(plan.bank_slots, plan.bank_bytes // plan.bank_slots),
        make_kernels(runtime.name),
    )
    skeleton.replace(
        lambda number, switch: StreamedSwitch(streamer, number, switch, companions(switch))
    )
    choice = _choice(skeleton.model, plan, settings)
    streamer.whole, streamer.whole_in = choice.whole is None, choice.whole_in
    take_over(skeleton.model, streamer, runtime, choice)
    resident = list(skeleton.resident().values())
    nbytes = sum(array.nbytes for array in resident)
    plan = replace(plan, resident_bytes=nbytes, choice=choice)
    _materialise(resident, progress)
    seconds = time.perf_counter() - start
    return StreamedModel(skeleton.model, skeleton.config, path, plan, streamer, runtime, seconds)


def _choice(model: nn.Module, plan: Plan, settings: Settings) -> Choice:
    """As asked, where we know the formula of every mixture; elsewhere the block's own alone."""
    k, own, known = plan.experts_per_token, plan.own_experts_per_token, knows_formula(model)
    asked = {
        "weights=keep": settings.weights == "keep" and k < own,
        "skip_below": settings.skip_below > 0,
        "prefer_cached": settings.prefer_cached > 0,
        f"whole={settings.whole}": bool(settings.whole),
    }
    if not known and (wanted := [name for name, yes in asked.items() if yes]):
        raise OptionError(
            f"{wanted[0]}: not known how for {plan.architecture}, whose router we do not "
            "compute. Leave it out."
        )
    if settings.whole is not None and plan.first_bytes is None:
        raise OptionError(
            "whole: the model is not in two planes. Pack its 4-bit checkpoint with: "
            "llm flash-moe pack SOURCE --planes"
        )
    if settings.whole is None and settings.whole_in:
        raise OptionError("whole_in goes with whole: say how many are read whole elsewhere.")
    keep = known and k < own and settings.weights != "renormalise"
    return Choice(
        k,
        own if keep else k,
        renormalises(model),
        settings.skip_below,
        settings.prefer_cached,
        settings.whole,
        settings.whole_in,
    )


def _require_computable(runtime: Runtime, layers: list[ExpertLayer]) -> None:
    """MLX's CPU back end multiplies by stacks of plain 16-bit matrices not at all."""
    if runtime.name != "mlx" or runtime.widen or mx.default_device() != mx.cpu:
        return
    for layer in layers:
        plain = {name for name, packing in layer.layout.quantization if packing is None}
        if any(p.projection in plain and p.dtype != "float32" for p in layer.layout.parts):
            raise OptionError(
                "runtime=mlx cannot compute experts of unquantized 16-bit weights on a CPU. "
                "Choose auto, which computes them in float32."
            )


def _materialise(arrays: list[mx.array], progress: Progress) -> None:
    total = sum(array.nbytes for array in arrays)
    done, step, pending = 0, 0, list[mx.array]()
    for array in arrays:
        pending.append(array)
        step += array.nbytes
        if step >= LOAD_STEP_BYTES:
            mx.eval(pending)
            done, step, pending = done + step, 0, []
            progress(done, total)
    mx.eval(pending)
    progress(total, total)
