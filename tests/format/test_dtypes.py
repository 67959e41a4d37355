"""The table of number types agrees with MLX, numpy and safetensors' own names."""

from __future__ import annotations

import mlx.core as mx
import pytest

from flash_moe.arrays import dtype_name, mlx_dtype
from flash_moe.format.dtypes import BY_NAME, BY_SAFETENSORS, FLOATS


@pytest.mark.parametrize("name", BY_NAME)
def test_sizes_and_names(name: str) -> None:
    dtype, own = BY_NAME[name], mlx_dtype(name)
    assert own.size == dtype.nbytes == dtype.numpy.itemsize
    assert dtype.bits == 8 * dtype.nbytes
    assert BY_SAFETENSORS[dtype.safetensors] is dtype
    assert dtype_name(own) == name


def test_floats_are_those_that_weights_have() -> None:
    assert all(mx.issubdtype(mlx_dtype(name), mx.floating) for name in FLOATS)
