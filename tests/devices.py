"""The device and the runtimes that tests have here, and how exactly results are compared.

On a CPU, MLX computes every row on its own and in one order: equal inputs give equal bits. A GPU
may choose another kernel for another shape, and so another order of a sum: there, results are equal
up to rounding. Tests that need equal bits run on the CPU everywhere, by the fixture `on_cpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from flash_moe.kernels.runtime import choose_runtime

GPU = mx.default_device() == mx.gpu
CUDA = GPU and not mx.metal.is_available()

# The fastest runtime of this machine, and plain MLX.
RUNTIMES = list(dict.fromkeys((choose_runtime().name, "mlx")))

# Of the largest value. One layer on an H200 differs by 1e-7; 16-bit results by a unit or two in the
# last place, because they are rounded from different numbers.
ROUNDING = {mx.float32: 1e-5, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}

needs_native = pytest.mark.skipif(
    "native" not in RUNTIMES, reason="the native runtime takes a C compiler, and arrays on the CPU"
)


@contextmanager
def cpu() -> Iterator[None]:
    """Within, this thread computes on the CPU, as on a machine without a GPU."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(device)


def relative_difference(got: mx.array, expected: mx.array) -> float:
    """The largest difference as a share of the largest expected value; NaN if any value is NaN."""
    wide, other = expected.astype(mx.float32), got.astype(mx.float32)
    largest = mx.maximum(mx.abs(wide).max(), 1e-30)
    return float((mx.abs(other - wide).max() / largest).item())


def assert_exact_on_cpu(
    got: mx.array, expected: mx.array, what: str = "result", tolerance: float | None = None
) -> None:
    """The same bits on a CPU; on a GPU the same up to rounding, which is that of one layer unless
    `tolerance` says otherwise."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    if mx.default_device() == mx.cpu:
        assert mx.array_equal(got, expected), f"{what}: off by {relative_difference(got, expected)}"
    elif got.size:
        difference = relative_difference(got, expected)
        assert difference <= (tolerance or ROUNDING[got.dtype]), f"{what}: off by {difference:.1e}"
