"""Where the GPU kernels run in tests: on this machine's GPU, or as Metal under the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_moe.kernels import shaders
from flash_moe.kernels.shaders import GpuKind
from tests.devices import CUDA, GPU
from tests.metal.compiler import clang
from tests.metal.emulator import emulated

F64 = npt.NDArray[np.float64]
KIND: GpuKind = "cuda" if CUDA else "metal"
# CUDA's compiler takes seconds for a choice of constants, clang 0.15 of one.
EXAMPLES = 8 if GPU else 25
RUNS = 3


@contextmanager
def kernels_run(schedule: int = 0) -> Iterator[None]:
    """Within, flash_moe.kernels.gpu computes for KIND. `schedule` is the emulator's; a GPU has its
    own. Skips the test where there is neither a GPU nor a compiler for the emulator."""
    if GPU:
        yield
        return
    clang()
    shaders.kernel.cache_clear()
    try:
        with emulated(schedule=schedule):
            yield
    finally:
        shaders.kernel.cache_clear()


def same_in_all_schedules(launch: Callable[[], list[mx.array]]) -> list[F64]:
    """The outputs, the same to the bit under three schedules (on a GPU: in three runs)."""
    outcomes = []
    for schedule in range(RUNS):
        with kernels_run(schedule):
            arrays = launch()
            mx.eval(arrays)
            outcomes.append(arrays)
    for other in outcomes[1:]:
        for one, two in zip(outcomes[0], other, strict=True):
            assert bits(one) == bits(two), "another schedule gives another result"
    return [to_numpy(array) for array in outcomes[0]]


def bits(array: mx.array) -> bytes:
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(raw).tobytes()


def to_numpy(array: mx.array) -> F64:
    wide = array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
    return np.array(wide).astype(np.float64)


def to_mlx(values: npt.NDArray[np.floating], dtype: str) -> mx.array:
    return mx.array(values.astype(np.float32)).astype(getattr(mx, dtype))
