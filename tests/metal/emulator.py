"""Runs Metal kernels on this machine's CPU: the text that MLX generates, as clang compiles it.

MLX makes no kernel without Metal, but it does write its text when it traces for export. `capture`
takes that from the very Python calls that a Mac would make; `run` runs one kernel of it; within
`emulated` every mx.fast.metal_kernel runs so, and whole models can be run.

What it finds, beside wrong numbers: accesses outside of buffers (pages that fault, canaries,
AddressSanitizer), missing barriers (several schedules, ThreadSanitizer), divergence at simdgroup
operations, more threadgroup memory than there is. What it cannot: what Apple's compiler thinks of
the text, its rounding of exp and its order in simd_sum, and anything of speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import mlx.core as mx
import numpy as np

from tests.metal.capture import Buffer, KernelCall, capture
from tests.metal.compiler import Build, needs_clang
from tests.metal.launch import (
    Array,
    EmulatorError,
    Guard,
    Ranges,
    run_plain,
    run_sanitized,
    to_mlx,
    to_numpy,
)

__all__ = [
    "Array",
    "Buffer",
    "Build",
    "EmulatorError",
    "Guard",
    "KernelCall",
    "Options",
    "Ranges",
    "capture",
    "emulated",
    "needs_clang",
    "run",
    "to_mlx",
    "to_numpy",
]


class Options(TypedDict, total=False):
    build: Build
    schedule: int
    seed: int
    guard: Guard
    forbidden: Ranges | None


def run(
    call: KernelCall,
    inputs: Sequence[Array],
    *,
    build: Build = "plain",
    schedule: int = 0,
    seed: int = 0,
    guard: Guard = "end",
    forbidden: Ranges | None = None,
) -> list[Array]:
    """The outputs of a call. bfloat16 is uint16 here.

    `schedule` is 0 for threads in order, 1 reversed, 2 any order, from `seed`. `guard` says at
    which end of a buffer lies a page that faults. `forbidden` are byte ranges of inputs that the
    kernel must not read: ASan faults on them; in a plain build they hold one garbage, then
    another, and the outputs must not differ.
    """
    for buffer, array in zip(call.inputs, inputs, strict=True):
        if buffer.shape != array.shape or buffer.nbytes != array.nbytes:
            raise ValueError(f"{buffer} cannot be {array.dtype} {array.shape}")
    if unknown := set(forbidden or ()) - {buffer.name for buffer in call.inputs}:
        raise ValueError(f"{call.file} has no inputs {unknown}")
    arrays = [np.ascontiguousarray(array).reshape(array.shape) for array in inputs]
    if build != "plain":
        return run_sanitized(call, arrays, build, schedule, seed, forbidden or {})
    if not forbidden:
        return run_plain(call, arrays, schedule, seed, guard)
    outcomes = []
    for fill in (0xFF, 0x5A):
        soiled = [array.copy() for array in arrays]
        for buffer, array in zip(call.inputs, soiled, strict=True):
            for begin, end in forbidden.get(buffer.name, ()):
                array.reshape(-1).view(np.uint8)[begin:end] = fill
        outcomes.append(run_plain(call, soiled, schedule, seed, guard))
    for buffer, one, other in zip(call.outputs, *outcomes, strict=True):
        if one.tobytes() != other.tobytes():
            raise EmulatorError("forbidden", f"`{buffer.name}` depends on forbidden bytes", call)
    return outcomes[0]


@contextmanager
def emulated(**options: Unpack[Options]) -> Iterator[list[KernelCall]]:
    """Kernels that are built within run here; yields the list of their calls as they happen.

    Options are those of `run`. Replaces mx.fast.metal_kernel, so kernels that were built before
    must be built again, and kernels that are built within are of no use afterwards.
    """
    calls: list[KernelCall] = []
    make: Any = mx.fast.metal_kernel
    forbidden = options.get("forbidden") or {}

    def metal_kernel(*args: Any, **kwargs: Any) -> Callable[..., list[mx.array]]:
        kernel = make(*args, **kwargs)

        def launch(
            *, inputs: Sequence[Any], init_value: float | None = None, **rest: Any
        ) -> list[mx.array]:
            arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
            mx.eval(arrays)
            (call,) = capture(lambda *a: kernel(inputs=list(a), **rest), *arrays)
            calls.append(call := replace(call, init=init_value))
            own = {b.name: forbidden[b.name] for b in call.inputs if b.name in forbidden}
            merged: Options = {**options, "forbidden": own}
            results = run(call, [to_numpy(a) for a in arrays], **merged)
            return [to_mlx(a, b.dtype) for a, b in zip(results, call.outputs, strict=True)]

        return launch

    mx.fast.metal_kernel = metal_kernel
    try:
        yield calls
    finally:
        mx.fast.metal_kernel = make
    if unknown := set(forbidden) - {buffer.name for call in calls for buffer in call.inputs}:
        raise ValueError(f"no kernel has inputs {unknown}")
