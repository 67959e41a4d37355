"""Inputs for the native kernels, and what counts as right."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from flash_moe.kernels.native import Native
from flash_moe.kernels.spec import BITS, GROUP_SIZES, SCALE_TYPES, ExpertSpec, Matrix
from flash_moe.kernels.structs import Resident, resident
from tests.kernels import reference as ref

seeds = st.integers(0, 2**32 - 1)


@st.composite
def specs(draw: st.DrawFn) -> ExpertSpec:
    """Dimensions that no block size divides, and small ones."""
    group = draw(st.sampled_from(GROUP_SIZES))
    return ref.make_spec(
        group * draw(st.integers(1, 640 // group)),
        group * draw(st.integers(1, 384 // group)),
        draw(st.sampled_from(BITS)),
        group,
        draw(st.sampled_from(SCALE_TYPES)),
        draw(st.sampled_from(BITS)),
    )


scale_kinds = st.builds(
    ref.Scales,
    magnitude=st.sampled_from([1.0, 2.0**-30, 2.0**-8]),
    spread=st.sampled_from([0.0, 8.0]),
    negative=st.booleans(),
    zeros=st.booleans(),
)


def random_matrix(
    rows: int, columns: int, bits: int, group: int, kind: str, rng: np.random.Generator
) -> tuple[Matrix, ref.Bytes]:
    """A matrix alone in a record, every row of another magnitude, from subnormal to 2^90.

    Its parts lie one right after the other; make_spec's are 64-byte aligned.
    """
    size = (rows, columns // group)
    low, high = {"float16": (-26, 12), "bfloat16": (-140, 90), "float32": (-149, 90)}[kind]
    exponent = rng.uniform(low, high, (rows, 1)) + rng.uniform(-4, 4, size)
    scale, bias = (rng.choice([-1.0, 0, 1], size, p=[0.5, 0.1, 0.4]) * 2.0**exponent for _ in "sb")
    parts = [rng.integers(0, 256, (rows, columns * bits // 8), np.uint8)]
    parts += [ref.from_float(part, kind) for part in (scale, bias)]
    offsets = np.cumsum([0, *(part.size for part in parts)]).tolist()
    matrix = Matrix(rows, columns, bits, group, kind, *offsets[:3])
    return matrix, np.concatenate([part.reshape(-1) for part in parts])


def as_resident(matrix: Matrix, record: ref.Bytes) -> Resident:
    groups = matrix.rows * matrix.columns // matrix.group_size
    raw = np.uint16 if matrix.scale_type == "bfloat16" else np.dtype(matrix.scale_type)
    size = groups * np.dtype(raw).itemsize
    parts = [
        np.ascontiguousarray(record[o : o + size]).view(raw).reshape(matrix.rows, -1)
        for o in (matrix.scales, matrix.biases)
    ]
    weight = np.ascontiguousarray(record[: matrix.scales]).view(np.uint32)
    return resident(
        weight.reshape(matrix.rows, -1), *parts, bits=matrix.bits, group_size=matrix.group_size
    )


def within(got: np.ndarray, want: ref.Bounded) -> bool:
    # A result beyond float32 may be infinite or, where terms of both signs are, not a number.
    reachable = np.abs(want.value) + want.error < 2.0**120
    off = np.abs(got.astype(np.float64) - want.value)
    return bool(np.all(~reachable | (off <= want.error + ref.SMALLEST["float32"])))


def layer(native: Native, seed: int = 0) -> np.ndarray:
    spec = ref.make_spec(256, 128, 2, 64)
    rng = np.random.default_rng(seed)
    bank = memoryview(ref.random_record(spec, rng))
    x = rng.normal(size=(3, 256)).astype(np.float32)
    return native.experts(spec, bank, x, np.zeros((3, 2), np.uint32), np.ones((3, 2), np.float32))
