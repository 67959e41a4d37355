"""Is the emulator to be believed? It must run known-good Metal right, keep to Metal's rules, and
report what breaks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal.emulator import (
    emulated,
    needs_clang,
    run,
    to_mlx,
    to_numpy,
)
from tests.metal.small import one_kernel

pytestmark = needs_clang

SCHEDULES = (0, 1, 2)
ZEROS = np.zeros(8, np.float32)


# -- the indices of threads ----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ids_at_ragged_edges(schedule: int) -> None:
    """A grid is in threads, and its last threadgroups may be smaller."""
    fields = (
        "thread_position_in_grid.x + 100u * thread_position_in_grid.y",
        "thread_position_in_threadgroup.x + 100u * threadgroup_position_in_grid.x",
        "threads_per_threadgroup.x + 100u * threads_per_threadgroup.y",
        "thread_index_in_simdgroup + 100u * simdgroup_index_in_threadgroup",
        "thread_index_in_threadgroup + 100u * simdgroups_per_threadgroup",
        "threads_per_grid.x + 100u * threadgroups_per_grid.x + threads_per_simdgroup",
    )
    at = "uint at = thread_position_in_grid.x + 70u * thread_position_in_grid.y;"
    body = at + "".join(f"y[{len(fields)}u * at + {i}u] = {f};" for i, f in enumerate(fields))
    call = one_kernel(
        *(body, [mx.zeros((8,))], [(210, len(fields))]),
        dtype=mx.uint32,
        grid=(70, 3, 1),
        threadgroup=(32, 2, 1),
    )
    (got,) = run(call, [ZEROS], schedule=schedule)
    x, y = np.tile(np.arange(70), 3), np.repeat(np.arange(3), 70)
    wide, high = np.where(x < 64, 32, 6), np.where(y < 2, 2, 1)
    index = x % 32 + wide * (y % 2)
    want = [
        *(x + 100 * y, x % 32 + 100 * (x // 32), wide + 100 * high),
        *(index % 32 + 100 * (index // 32), index + 100 * -(-wide * high // 32)),
        np.full(210, 70 + 300 + 32),
    ]
    assert (got == np.stack(want, 1)).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("operation", "want"),
    [
        ("simd_sum(v)", lambda v: np.full(32, v.sum())),
        ("simd_max(v)", lambda v: np.full(32, v.max())),
        ("simd_min(v)", lambda v: np.full(32, v.min())),
        ("simd_broadcast(v, 5)", lambda v: np.full(32, v[5])),
        ("simd_shuffle(v, ushort(31u - lane))", lambda v: v[::-1]),
        ("simd_shuffle_xor(v, 3)", lambda v: v[np.arange(32) ^ 3]),
        ("simd_shuffle_down(v, 4)", lambda v: v[np.minimum(np.arange(32) + 4, 31)][:28]),
    ],
)
def test_simdgroup_operations(operation: str, want: Any, schedule: int) -> None:
    """In two simdgroups, twice in a row: the second must not meet the first one's values."""
    body = f"""uint i = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup;
      float v = a[i]; y[i] = {operation}; v = a[63u - i]; z[i] = {operation};"""
    call = one_kernel(
        *(body, [mx.zeros((64,))], [(64,), (64,)]), grid=(64, 1, 1), threadgroup=(64, 1, 1)
    )
    a = np.random.default_rng(3).permutation(64).astype(np.float32)
    for got, values in zip(run(call, [a], schedule=schedule), (a, a[::-1]), strict=True):
        for half in (slice(0, 32), slice(32, 64)):
            expected = want(values[half])
            assert (got[half][: len(expected)] == expected).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_narrow_floats_round_as_mlx_does(dtype: mx.Dtype) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 1 << 14, np.uint32)
    edges = np.array([0x3F808000, 0x3F818000, 0x7F800000, 0xFF800000, 0x7F7FFFFF], np.uint32)
    a = np.concatenate([bits, bits & 0x8FFFFFFF | 0x30000000, edges]).view(np.float32)
    a = a[~np.isnan(a)]  # whose bits may differ
    body = "uint i = thread_position_in_grid.x; y[i] = T(a[i]); z[i] = T(float(T(a[i])));"
    call = one_kernel(
        *(body, [mx.zeros(a.shape)], [a.shape, a.shape]),
        dtype=dtype,
        grid=(a.size, 1, 1),
        template=[("T", dtype)],
    )
    want = to_numpy(mx.array(a).astype(dtype)).view(np.uint16)
    for got in run(call, [a]):
        assert (got.view(np.uint16) == want).all()


def test_facts_scalars_and_template_arguments() -> None:
    body = """if (thread_position_in_grid.x == 0) {
      y[0] = float(a_shape[1]); y[1] = float(a_strides[0]); y[2] = float(a_ndim);
      y[3] = b; y[4] = c[3]; y[5] = float(N); y[6] = FLAG ? 1.0f : 0.0f; }"""
    arrays = [mx.zeros((3, 5)), mx.array(0.0), mx.zeros((4,))]
    call = one_kernel(body, arrays, [(8,)], template=[("N", -7), ("FLAG", True)])
    arrays = [np.zeros((3, 5), "f4"), np.array(2.5, "f4"), np.arange(4.0, dtype="f4")]
    (got,) = run(call, arrays)
    assert got[:7].tolist() == [5, 5, 2, 2.5, 3, -7, 1]
    assert np.isnan(got[7])  # what nobody wrote


def test_threadgroup_memory_is_fresh() -> None:
    """No group finds what the last one left."""
    body = """threadgroup float t[4]; uint g = threadgroup_position_in_grid.x;
      y[g] = t[1]; t[1] = 1.0f;"""
    call = one_kernel(body, outputs=[(4,)], grid=(4, 1, 1), threadgroup=(1, 1, 1))
    assert np.isnan(run(call, [ZEROS])[0]).all()


# -- within MLX ----------------------------------------------------------------------------------


def test_emulated_runs_between_operations_of_mlx() -> None:
    own = mx.fast.metal_kernel
    with emulated(schedule=1) as calls:
        make: Any = mx.fast.metal_kernel
        kernel = make(
            name="add",
            input_names=["a", "b"],
            output_names=["y"],
            source="uint i = thread_position_in_grid.x; if (i != 3) y[i] = T(float(a[i]) + b);",
        )
        x = mx.arange(64).astype(mx.bfloat16) * 2
        (y,) = kernel(
            inputs=[x, 1.0],
            template=[("T", mx.bfloat16)],
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[mx.bfloat16],
            init_value=-4,
        )
        got = (y * 2).tolist()
    assert got == [(2 * i + 1) * 2 if i != 3 else -8 for i in range(64)]
    assert [call.inputs[1].shape for call in calls] == [()]
    assert mx.fast.metal_kernel is own


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.bool_])
def test_arrays_go_there_and_back(dtype: mx.Dtype) -> None:
    for shape in ((3, 5), (), (0, 2)):
        array = mx.random.normal(shape).astype(dtype)
        back = to_mlx(to_numpy(array), dtype)
        assert (back.shape, back.dtype) == (array.shape, array.dtype)
        assert mx.array_equal(back, array)


# -- known-good Metal ----------------------------------------------------------------------------


def qmv_header() -> str:
    """MLX's own kernel out of the installed wheel, without what else is in the file."""
    path = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/quantized.h"
    if not path.exists():
        pytest.skip("this MLX has no Metal sources")
    text = path.read_text()
    constants = text.index("MLX_MTL_CONST int SIMD_SIZE")
    functions = [
        text[constants : text.index("load_vector_safe")].rsplit("template", 1)[0],
        *(_function(text, name) for name in ("qdot(", "qdot_safe(", "load_vector_safe(")),
        _function(text, "qmv_fast_impl("),
    ]
    return "#define MLX_MTL_CONST static constant constexpr const\n" + "\n".join(functions)


def _function(text: str, name: str) -> str:
    begin = text.rindex("template <", 0, text.index(f" {name}"))
    return text[begin : text.index("\n}\n", begin) + 3]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_mlx_qmv_fast(dtype: mx.Dtype) -> None:
    """All widths in one kernel, so that there are two to compile and not ten."""
    widths, rows, columns = (2, 3, 4, 6, 8), 16, 1024
    body = "".join(
        f"if (e[2] == {bits}) qmv_fast_impl<T, 64, {bits}>(a, b, c, d, y, e[0], e[1],"
        " threadgroup_position_in_grid, simdgroup_index_in_threadgroup,"
        " thread_index_in_simdgroup);\n"
        for bits in widths
    )
    header, rng = qmv_header(), np.random.default_rng(0)
    x = mx.array(rng.standard_normal((1, columns)), dtype=dtype)
    for bits in widths:
        w = mx.array(rng.standard_normal((rows, columns)), dtype=dtype)
        packed, scales, biases = mx.quantize(w, group_size=64, bits=bits)
        facts = mx.array([columns, rows, bits], dtype=mx.int32)
        arrays = [packed, scales, biases, x, facts]
        call = one_kernel(
            *(body, arrays, [(rows,)]),
            dtype=dtype,
            grid=(32, 2 * rows // 8, 1),
            threadgroup=(32, 2, 1),
            header=header,
            template=[("T", dtype)],
        )
        full = mx.dequantize(
            packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=bits
        )
        want = np.array(full, np.float64) @ np.array(x.astype(mx.float32), np.float64)[0]
        for guard in ("end", "start"):
            (got,) = run(call, [to_numpy(a) for a in arrays], guard=guard)
            error = np.abs(np.array(to_mlx(got, dtype).astype(mx.float32)) - want).max()
            # float32: 3e-7 seen; bfloat16: half a unit of its 8 bits, 2e-3, is its rounding.
            assert error <= (2e-6 if dtype == mx.float32 else 2**-8) * np.abs(want).max()
