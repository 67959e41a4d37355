"""Kernels of a line or two, for the tests of the emulator itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from tests.metal.emulator import KernelCall, capture

Shape = tuple[int, ...]


def one_kernel(
    body: str,
    inputs: Sequence[mx.array] = (),
    outputs: Sequence[Shape] = ((64,),),
    *,
    dtype: mx.Dtype = mx.float32,
    grid: tuple[int, int, int] = (32, 1, 1),
    threadgroup: tuple[int, int, int] = (32, 1, 1),
    header: str = "",
    template: Sequence[tuple[str, Any]] | None = None,
) -> KernelCall:
    """A kernel of inputs a, b, c … and outputs y, z …"""

    def launch(*arrays: mx.array) -> list[mx.array]:
        make: Any = mx.fast.metal_kernel
        kernel = make(
            name="small",
            input_names=list("abcde"[: len(arrays)]),
            output_names=list("yzw"[: len(outputs)]),
            header=header,
            source=body,
        )
        results: list[mx.array] = kernel(
            inputs=list(arrays),
            template=template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(outputs),
            output_dtypes=[dtype] * len(outputs),
        )
        return results

    # Export wants an input to trace from.
    (call,) = capture(launch, *(inputs or [mx.zeros((8,))]))
    return call
