"""The expert kernels' results, computed in float64 and straight from the bits, without MLX.

The bounds are derived, not tuned. A sum of n float32 products, in any order, is off by at most
gamma_n * sum |terms| with gamma_n = n * u / (1 - n * u), u = 2^-24. `Expert` carries that through
gate, up, the activation and down, so an answer is wrong when it is further off than rounding can
explain, however large or small the numbers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flash_moe.format.layout import Quantization as Packing
from flash_moe.format.layout import make_layout
from flash_moe.kernels.spec import ExpertSpec, Matrix, expert_spec

F64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
# GPUs may flush subnormal numbers to zero, operands and results.
FLUSH = 2.0**-126


def gamma(n: int) -> float:
    u = UNIT["float32"]
    return n * u / (1 - n * u)


# -- bits ---------------------------------------------------------------------------------------


def pack(codes: npt.NDArray[np.integer[Any]], bits: int) -> Bytes:
    """Rows of codes as MLX packs them: a little-endian stream of `bits` bits each."""
    planes = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(codes.shape[0], -1), axis=-1, bitorder="little")


def unpack(packed: Bytes, bits: int) -> npt.NDArray[np.int64]:
    planes = np.unpackbits(packed, axis=-1, bitorder="little")
    codes = planes.reshape(packed.shape[0], -1, bits).astype(np.int64)
    return codes @ (1 << np.arange(bits))


def to_float(raw: Bytes, kind: str) -> F64:
    if kind == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(kind).astype(np.float64)


def from_float(values: npt.NDArray[Any], kind: str) -> Bytes:
    """Rounded to nearest even, as every converter does it."""
    single = np.ascontiguousarray(values, np.float32)
    if kind != "bfloat16":
        return np.ascontiguousarray(single.astype(kind)).view(np.uint8)
    word = single.view(np.uint32)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.ascontiguousarray(rounded.astype(np.uint16)).view(np.uint8)


def rounded(values: npt.NDArray[Any], kind: str) -> F64:
    """Values that the type can hold, for inputs."""
    return to_float(from_float(values, kind), kind).reshape(np.shape(values))


# -- records ------------------------------------------------------------------------------------


def make_spec(
    hidden: int,
    intermediate: int,
    bits: int,
    group_size: int,
    scale_type: str = "bfloat16",
    down_bits: int | None = None,
) -> ExpertSpec:
    """The spec of a SwitchGLU's record, by the product's own layout."""
    arrays, kinds = [], []
    shapes = {
        "gate_proj": (intermediate, hidden, bits),
        "up_proj": (intermediate, hidden, bits),
        "down_proj": (hidden, intermediate, down_bits or bits),
    }
    for name, (rows, columns, b) in shapes.items():
        kinds.append((name, Packing(b, group_size, "affine")))
        arrays.append((name, "weight", "uint32", (rows, columns * b // 32)))
        for part in ("scales", "biases"):
            arrays.append((name, part, scale_type, (rows, columns // group_size)))
    layout = make_layout(arrays, kinds)
    return expert_spec(layout, layout.stride)


@dataclass(frozen=True, slots=True)
class Scales:
    """How large and how odd the scales and biases are."""

    magnitude: float = 1.0
    spread: float = 0.0  # scales range over 2^±spread
    negative: bool = True
    zeros: bool = False


ORDINARY = Scales()


def random_record(spec: ExpertSpec, rng: np.random.Generator, scales: Scales = ORDINARY) -> Bytes:
    """One record of random codes, with noise between and after its parts."""
    record = rng.integers(0, 256, spec.stride, np.uint8)
    for matrix in (spec.gate, spec.up, spec.down):
        groups = matrix.columns // matrix.group_size
        size = (matrix.rows, groups)
        codes = rng.integers(0, 1 << matrix.bits, (matrix.rows, matrix.columns))
        scale = rng.uniform(0.5, 1.5, size) * scales.magnitude / np.sqrt(matrix.columns)
        scale *= 2.0 ** rng.uniform(-scales.spread, scales.spread, size)
        if scales.negative:
            scale *= rng.choice([-1.0, 1.0], size)
        if scales.zeros:
            scale *= rng.integers(0, 2, size)
        bias = -scale * (1 << matrix.bits) * rng.uniform(0.3, 0.7, size)
        place(record, matrix.weight, pack(codes, matrix.bits))
        place(record, matrix.scales, from_float(scale, matrix.scale_type))
        place(record, matrix.biases, from_float(bias, matrix.scale_type))
    return record


def place(record: Bytes, offset: int, data: Bytes) -> None:
    flat = data.reshape(-1)
    record[offset : offset + flat.size] = flat


def dequantize(record: Bytes, matrix: Matrix) -> F64:
    scale, bias = (_groups(record, matrix, offset) for offset in (matrix.scales, matrix.biases))
    return read_codes(record, matrix) * np.repeat(scale, matrix.group_size, 1) + np.repeat(
        bias, matrix.group_size, 1
    )


def read_codes(record: Bytes, matrix: Matrix) -> npt.NDArray[np.int64]:
    size = matrix.rows * matrix.columns * matrix.bits // 8
    packed = record[matrix.weight : matrix.weight + size].reshape(matrix.rows, -1)
    return unpack(packed, matrix.bits)


def _groups(record: Bytes, matrix: Matrix, offset: int) -> F64:
    count = matrix.rows * (matrix.columns // matrix.group_size)
    size = {"float32": 4}.get(matrix.scale_type, 2)
    raw = np.ascontiguousarray(record[offset : offset + count * size])
    return to_float(raw, matrix.scale_type).reshape(matrix.rows, -1)


# -- mathematics, each value with the error that float32 may make --------------------------------


@dataclass(frozen=True, slots=True)
class Bounded:
    value: F64
    error: F64

    def rounded_to(self, kind: str) -> F64:
        """The error with one more rounding, of the output."""
        half_ulp = UNIT[kind] * (np.abs(self.value) + self.error)
        return self.error + half_ulp + SMALLEST[kind] + (FLUSH if kind != "float16" else 0.0)


def product(record: Bytes, matrix: Matrix, x: Bounded) -> Bounded:
    """matrix · x for x [n, columns], computed as scale * sum(code x) + bias * sum(x).

    Each group is a sum of group_size products, scaled, and added to the others: at most
    n = columns + groups + 8 roundings on the way of any term, whatever the order. The terms are
    |scale| code |x| and |bias| |x|, not their difference: the two sums may cancel.
    """
    size = matrix.group_size
    scale = np.repeat(_groups(record, matrix, matrix.scales), size, 1)
    bias = np.repeat(_groups(record, matrix, matrix.biases), size, 1)
    codes = read_codes(record, matrix)
    terms = np.abs(scale) * codes + np.abs(bias)
    n = matrix.columns + matrix.columns // size + 8
    value = x.value @ (codes * scale + bias).T
    error = (gamma(n) * np.abs(x.value) + (1 + gamma(n)) * x.error) @ terms.T
    # Flushed: a product, x (which a kernel may hold divided by up to 2^30, with codes up to 2^32),
    # a scale or a bias.
    size_x = (np.abs(x.value) + x.error).sum(1)[:, None] + 1
    flushed = FLUSH * (
        2 * matrix.columns + np.abs(scale).sum(1) * 2.0**33 + size_x * 2.0 ** (matrix.bits + 1)
    )
    return Bounded(value, error + flushed)


def swiglu(gate: Bounded, up: Bounded) -> Bounded:
    """silu(gate) * up. |silu'| <= 1.1; exp in float32 is good to 2 units, of an argument rounded
    by one: its relative error is (|gate| + 4) u, of which the division and products add 4."""
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-gate.value))
    silu = gate.value * sigmoid
    # Where exp overflows silu underflows: the part (|gate| + 8) u holds only where exp matters.
    relative = (np.minimum(np.abs(gate.value), 104) + 8) * UNIT["float32"]
    silu_error = 1.1 * gate.error + np.abs(silu) * relative + FLUSH * (np.abs(gate.value) + 1)
    value = silu * up.value
    error = silu_error * (np.abs(up.value) + up.error) + np.abs(silu) * up.error
    return Bounded(value, error + np.abs(value) * 2 * UNIT["float32"] + FLUSH)


def expert(record: Bytes, spec: ExpertSpec, x: F64) -> Bounded:
    """down(silu(gate x) * up x) for x [n, hidden]."""
    return product(record, spec.down, hidden_state(record, spec, x))


def hidden_state(record: Bytes, spec: ExpertSpec, x: F64) -> Bounded:
    exact = Bounded(x, np.zeros_like(x))
    return swiglu(product(record, spec.gate, exact), product(record, spec.up, exact))


def mixture(
    bank: list[Bytes], spec: ExpertSpec, x: F64, slots: npt.NDArray[np.uint32], weights: F64
) -> Bounded:
    """sum over k of weights[t, k] * expert_{slots[t, k]}(x[t])."""
    value, error, size = (np.zeros_like(x) for _ in range(3))
    for t, row in enumerate(slots):
        for weight, slot in zip(weights[t], row, strict=True):
            one = expert(bank[slot], spec, x[t : t + 1])
            value[t] += weight * one.value[0]
            error[t] += abs(weight) * one.error[0]
            size[t] += abs(weight) * (np.abs(one.value[0]) + one.error[0])
    return Bounded(value, error + gamma(slots.shape[1] + 3) * size + FLUSH * slots.shape[1])


def router(logits: F64, k: int, renormalise: bool) -> tuple[npt.NDArray[np.uint32], F64]:
    """Ids by falling logit, ties to the lowest, and their softmax over all experts."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    weights = np.take_along_axis(shifted / shifted.sum(-1, keepdims=True), ids, -1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids.astype(np.uint32), weights
