"""Who computes the experts. Chosen once, when a model is loaded, and named in the statistics.

metal   our kernels on Apple's GPU
cuda    the same kernels on NVIDIA's
native  our kernel in C on the CPU, compiled on this machine
mlx     MLX's own operations: asked for, on a CPU bit-identical to mlx-lm with all in memory

The first three differ from it by rounding only, and keep more digits. A CPU without a C compiler
gets `mlx` too, unasked, and then computes 16-bit weights in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx

from flash_moe.errors import OptionError
from flash_moe.kernels.native import NativeUnavailable, find_compiler, load_native

Name = Literal["metal", "cuda", "native", "mlx"]
Wish = Literal["auto", "metal", "cuda", "native", "mlx"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """`faster` is what would make a faster one available, if one could be had. `widen`: compute
    in float32 what the checkpoint has in 16 bits, because this machine is slow at those."""

    name: Name
    why: str
    faster: str | None = None
    widen: bool = False


def choose(wish: str = "auto") -> Runtime:
    """The fastest runtime of this machine, or the one that is wished for, or OptionError."""
    if wish not in get_args(Wish):
        raise OptionError(f"runtime={wish}: choose {', '.join(get_args(Wish))}.")
    if wish == "mlx":
        return Runtime("mlx", "as asked")
    best = _best()
    if wish not in ("auto", best.name):
        choices = " or ".join(dict.fromkeys(("auto", best.name, "mlx")))
        raise OptionError(
            f"runtime={wish} is not available here: choose {choices}. {_why_not(wish, best)}"
        )
    return best


def _why_not(wish: str, best: Runtime) -> str:
    """Last in a message, because it may end in a command."""
    if wish == "native":
        return best.faster or "It is for machines whose GPU MLX cannot use."
    return f"It needs {'an Apple' if wish == 'metal' else 'an NVIDIA'} GPU that MLX can use."


def _best() -> Runtime:
    if mx.metal.is_available():
        return Runtime("metal", "Apple GPU")
    if mx.default_device() == mx.gpu:
        return Runtime("cuda", "NVIDIA GPU")
    try:
        native = load_native()
    except NativeUnavailable as error:
        # MLX's CPU back end takes 9 times as long for bfloat16 as for float32 (24 against 2.7 ms
        # for 1024 × 4096 at 2 bits), and 45 times for float16.
        return Runtime("mlx", "no native kernel could be made", faster=str(error), widen=True)
    why = f"{native.simd} kernel, {native.threads} threads, compiled by {find_compiler()}"
    return Runtime("native", why, widen=True)
