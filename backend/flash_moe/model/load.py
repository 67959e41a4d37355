"""A model ready to run: mlx-lm's modules with resident weights, experts on disk.

Owns the store, the reader and the bank, and closes them. Arrays are evaluated in the thread that
loads; the same thread must run the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_moe import upstream
from flash_moe.arrays import on_cuda
from flash_moe.callbacks import Progress, no_progress
from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.locations import ExpertLayer
from flash_moe.checkpoint.plan import Plan, chosen_experts, make_plan
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.checkpoint.switches import companions
from flash_moe.clock import part
from flash_moe.errors import CheckpointError, FlashMoeError, OptionError, Remedy
from flash_moe.kernels.backends import make_kernels, make_operations
from flash_moe.kernels.cuda_build import settle_mlx
from flash_moe.kernels.native_backend import NativeLinear
from flash_moe.kernels.runtime import Runtime, choose_runtime
from flash_moe.machine import memory_bytes
from flash_moe.model.compiled import compile_only_among_ourselves
from flash_moe.model.install import (
    count_words,
    find_heads,
    install_kernels,
    knows_formula,
    renormalises,
)
from flash_moe.model.proof import explain, prove
from flash_moe.model.wired import wire
from flash_moe.native.build import first_time
from flash_moe.options import Settings
from flash_moe.stream.bank import Bank
from flash_moe.stream.choice import ExpertChoice
from flash_moe.stream.mapping import MappedExperts
from flash_moe.stream.precision import Precision
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import ExpertStore
from flash_moe.stream.streamed import StreamedLayer, StreamedSwitch, Streamer
from flash_moe.upstream import Replacement

# Resident weights are evaluated this much at a time, so that progress moves. In steps of 64 MiB
# they take a tenth longer from the page cache.
LOAD_STEP_BYTES = 256 << 20


@dataclass(slots=True)
class StreamedModel:
    """`operations` are those of mlx-lm's that our kernels compute. `heads` are the native matrices
    that give logits, `words` how many tokens the embedding
    knows. `warning` is for the user: what is slower
    than it should be. `compiles`: MLX has yet to compile its own kernels for this GPU."""

    model: nn.Module
    config: dict[str, Any]
    path: Path
    plan: Plan
    choice: ExpertChoice
    streamer: Streamer
    runtime: Runtime
    heads: list[NativeLinear]
    words: int
    load_seconds: float
    operations: dict[str, Replacement]
    warning: str | None = None
    compiles: bool = False
    _unwire: Callable[[], None] = lambda: None
    _thread: int = field(default_factory=threading.get_ident)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        if threading.get_ident() != self._thread:
            raise FlashMoeError("A loaded model runs in the thread that loaded it.")
        with upstream.operations(**self.operations):
            logits: mx.array = self.model(tokens, cache=cache)
        return logits

    def advance(self, tokens: mx.array, cache: list[Any]) -> None:
        """Take tokens into the cache, without their logits: of 512 tokens of the 397B, those would
        be 0.5 GB and, computed eagerly, most of the time."""
        for head in self.heads:
            head.skipped = True
        try:
            self(tokens, cache=cache)
        finally:
            for head in self.heads:
                head.skipped = False
        mx.eval([layer.state for layer in cache])

    def make_cache(self) -> list[Any]:
        """The state of a new conversation."""
        return upstream.make_cache(self.model)

    def require_known(self, tokens: Sequence[int]) -> None:
        """CheckpointError for a token that no embedding has a row for: MLX would read whatever lies
        behind it, or crash."""
        if not tokens or (min(tokens) >= 0 and max(tokens) < self.words):
            return
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise CheckpointError(
            f"The tokenizer gives token {wrong}, and the model has {self.words} of them: they do "
            "not belong together. Download the model's own tokenizer.json."
        )

    @property
    def lossy(self) -> list[str]:
        """What makes it less exact than the checkpoint, in words; empty if nothing does."""
        reasons = self.choice.lossy(self.plan.own_experts_per_token)
        made = self.plan.requantized
        # Two planes lose nothing where both are read, and the choice says where they are not.
        return reasons + ([str(made)] if made and not made.two_planes else [])

    def close(self) -> None:
        try:
            self.streamer.bank.drain()
        finally:
            self._unwire()
            self.streamer.close()


@part("model")
def load(
    path: Path, settings: Settings = Settings(), progress: Progress = no_progress
) -> StreamedModel:
    """Open a checkpoint folder or a pack and bring its resident weights, and only those, in."""
    start = time.perf_counter()
    runtime = choose_runtime(settings.runtime)
    compile_only_among_ourselves()
    compiles = on_cuda() and not settle_mlx()
    folder = open_folder(path)
    skeleton = open_skeleton(folder, chosen_experts(folder, settings.experts))
    layers = skeleton.layers()
    _require_computable(runtime, layers)
    plan = make_plan(skeleton, settings.bank_bytes)
    store, reader = ExpertStore(layers, settings.mode), Reader(settings.threads, settings.chunk)
    streamer = Streamer(
        store,
        reader,
        Bank(plan.bank_slots, plan.bank_bytes // plan.bank_slots),
        make_kernels(runtime.name),
        _mapping(runtime, settings, store, reader),
    )
    skeleton.replace(
        lambda number, switch: StreamedSwitch(
            StreamedLayer(streamer, number, switch), companions(switch)
        )
    )
    choice = _choice(skeleton.model, plan, settings)
    streamer.precision = choice.precision
    install_kernels(skeleton.model, streamer, runtime, choice)
    resident = list(skeleton.resident().values())
    plan = replace(plan, resident_bytes=sum(array.nbytes for array in resident))
    operations, failed = make_operations(runtime.name), list[str]()
    with ExitStack() as undo:
        undo.callback(streamer.close)
        unwire = wire(plan.resident_bytes + plan.bank_bytes)
        undo.callback(unwire)
        with part("weights"):
            _materialise(resident, progress)
        if runtime.name == "metal" or runtime.name == "cuda":
            make_cache = partial(upstream.make_cache, skeleton.model)
            with part("kernels"):
                failed = prove(skeleton.model, make_cache, operations, runtime.name)
        undo.pop_all()
    return StreamedModel(
        skeleton.model,
        skeleton.config,
        path,
        plan,
        choice,
        streamer,
        runtime,
        find_heads(skeleton.model),
        count_words(skeleton.model),
        time.perf_counter() - start,
        operations,
        explain(failed) or _slow(runtime),
        compiles,
        unwire,
    )


def _mapping(
    runtime: Runtime, settings: Settings, store: ExpertStore, reader: Reader
) -> MappedExperts | None:
    """For the kernels in C, which compute from any address."""
    limit = settings.mapped_bytes
    if limit is None:
        limit = memory_bytes() // 2
    if (
        runtime.name != "native"
        or settings.mode != "buffered"
        or reader.native is None
        or not limit
    ):
        return None
    return MappedExperts(store, reader.native, limit)


def _choice(model: nn.Module, plan: Plan, settings: Settings) -> ExpertChoice:
    """As asked, where the formula of every block is known; elsewhere only the block's own."""
    k, own, known = plan.experts_per_token, plan.own_experts_per_token, knows_formula(model)
    full, full_in = settings.full_experts, settings.full_experts_in or ()
    if not known:
        _refuse_unknown("cache_tolerance", settings.cache_tolerance, plan)
        _refuse_unknown("full_experts", full, plan)
    if full is not None and plan.first_plane_bytes is None:
        raise OptionError(
            f"full_experts={full}: this model is not packed in two planes.",
            Remedy.PACK_IN_PLANES,
        )
    if full is None and full_in:
        raise OptionError("full_experts_in needs full_experts, the number that counts elsewhere.")
    # With fewer experts than the model was trained with, each keeps the weight that it has among
    # all: better at four of ten than summing to one again (benchmarks/fewer-experts.md).
    return ExpertChoice(
        k,
        max(own, k) if known else k,
        renormalises(model),
        settings.cache_tolerance or 0.0,
        Precision(full, full_in),
    )


def _slow(runtime: Runtime) -> str | None:
    """Said once: everything works, and some want no compiler."""
    if runtime.name != "mlx" or not runtime.faster or not first_time("no-native-kernels"):
        return None
    return f"MLX computes the experts, 13 to 22 times slower than native kernels. {runtime.faster}"


def _refuse_unknown(name: str, value: float | None, plan: Plan) -> None:
    if value:
        raise OptionError(f"{name} is not supported for {plan.architecture}.")


def _require_computable(runtime: Runtime, layers: list[ExpertLayer]) -> None:
    """MLX's CPU back end cannot multiply by stacks of plain 16-bit matrices."""
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
    """MLX reads with threads of its own, straight into the arrays, at the disk's speed."""
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
