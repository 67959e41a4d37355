"""What computes the experts: chosen once, when a model is loaded, and named in the statistics.

metal   our kernels on Apple's GPU
cuda    the same kernels on NVIDIA's
native  our kernel in C on the CPU, from the package or compiled on this machine
mlx     MLX's own operations: if asked for; on a CPU bit-identical to mlx-lm with all in memory

The first three differ from it by rounding only, and keep more digits. A CPU without either
gets `mlx` without asking, and then computes 16-bit weights in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from flash_moe.errors import NativeUnavailable, OptionError
from flash_moe.kernels.native import load_native
from flash_moe.native.build import find_compiler
from flash_moe.native.shipped import is_shipped
from flash_moe.options import RUNTIMES, RuntimeName


@dataclass(frozen=True, slots=True)
class Runtime:
    """`faster` says what would make a faster runtime available, if anything would. `widen`:
    compute in float32 what the checkpoint has in 16 bits, because this machine is slow at those."""

    name: RuntimeName
    why: str
    faster: str | None = None
    widen: bool = False


def choose_runtime(runtime: str | None = None) -> Runtime:
    """The fastest runtime of this machine, or the one that is asked for, or OptionError."""
    runtime = "auto" if runtime is None else runtime
    if runtime not in RUNTIMES:
        raise OptionError(f"runtime={runtime}: choose {', '.join(RUNTIMES)}.")
    if runtime == "mlx":
        return Runtime("mlx", "as asked")
    best = _best()
    if runtime not in ("auto", best.name):
        choices = " or ".join(dict.fromkeys(("auto", best.name, "mlx")))
        raise OptionError(
            f"runtime={runtime} is not available here: choose {choices}. {_why_not(runtime, best)}"
        )
    return best


def _why_not(runtime: str, best: Runtime) -> str:
    """Last in a message, because it may end in a command."""
    if runtime == "native":
        return best.faster or "It is for machines whose GPU MLX cannot use."
    return f"It needs {'an Apple' if runtime == 'metal' else 'an NVIDIA'} GPU that MLX can use."


def _best() -> Runtime:
    if mx.default_device() == mx.gpu:
        on_metal = mx.metal.is_available()
        return Runtime("metal", "Apple GPU") if on_metal else Runtime("cuda", "NVIDIA GPU")
    try:
        native = load_native()
    except NativeUnavailable as error:
        # MLX's CPU back end takes 9 times as long for bfloat16 as for float32 (24 against 2.7 ms
        # for 1024 × 4096 at 2 bits), and 45 times for float16.
        return Runtime("mlx", "no native kernel could be compiled", str(error), widen=True)
    origin = "of the package" if is_shipped(native.file) else f"compiled by {find_compiler()}"
    why = f"{native.simd} kernel, {native.threads} threads, {origin}"
    return Runtime("native", why, widen=True)
