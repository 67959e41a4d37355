"""Weights to codes of fewer bits: `weight ≈ scale · code + bias`, one scale and bias a group.

Both ways minimise the squared error: in C, or in MLX's operations where there is no C compiler.
Both round scale and bias to their type before they choose codes, so that codes fit the numbers
that are multiplied later.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from flash_moe.arrays import dtype_name, numpy_view
from flash_moe.errors import CheckpointError, Remedy
from flash_moe.format.layout import AFFINE, Quantization
from flash_moe.machine import usable_cores
from flash_moe.pack.affine import nearest_codes, pack_codes
from flash_moe.pack.fit import SOURCE_BITS, SOURCE_GROUPS, NotFinite, load_fit
from flash_moe.pack.fit_mlx import alternating
from flash_moe.pack.transform import Arrays, Columns, require_sound

# Packed codes, scales, biases.
Matrix = tuple[mx.array, mx.array, mx.array]


class Quantize(Protocol):
    def __call__(
        self,
        arrays: Arrays,
        source: Quantization | None,
        bits: int,
        group_size: int,
        importance: Columns | None = None,
    ) -> Matrix:
        """Requantize a matrix as mlx-lm has it, affine or not quantized.

        `importance` weighs the squared error of each column. With the mean square of what a column
        is multiplied with, that is the error of products, as far as columns are independent.
        """


def fit_native(
    arrays: Arrays,
    source: Quantization | None,
    bits: int,
    group_size: int,
    importance: Columns | None = None,
) -> Matrix:
    """From codes where they are few: then the fit knows which weights are equal."""
    dtype = scale_dtype(arrays, source)
    fit, threads = load_fit(), usable_cores()
    try:
        if source and source.bits in SOURCE_BITS and source.group_size in SOURCE_GROUPS:
            fitted = fit.codes(
                *(numpy_view(arrays[name]) for name in AFFINE),
                source_bits=source.bits,
                source_group=source.group_size,
                bits=bits,
                group_size=group_size,
                importance=importance,
                threads=threads,
            )
        else:
            fitted = fit.values(
                numpy_view(float32_weights(arrays, source)),
                bits=bits,
                group_size=group_size,
                scale_type=dtype_name(dtype),
                importance=importance,
                threads=threads,
            )
    except NotFinite as error:
        raise not_finite() from error
    codes, scales, biases = map(mx.array, fitted)
    return codes, scales.view(dtype), biases.view(dtype)


def fit_in_mlx(
    arrays: Arrays,
    source: Quantization | None,
    bits: int,
    group_size: int,
    importance: Columns | None = None,
) -> Matrix:
    values, largest = float32_weights(arrays, source), (1 << bits) - 1
    groups = values.reshape(-1, group_size)
    weights = _spread(importance, values, groups)
    scales, biases = alternating(groups, weights, largest, scale_dtype(arrays, source))
    return encode(values, scales, biases, bits, group_size)


def encode(
    values: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> Matrix:
    """The nearest codes of weights [rows, columns], given each group's scale and bias [n, 1]."""
    if not mx.isfinite(scales + biases).all():
        raise not_finite()
    groups = values.reshape(-1, group_size)
    codes = nearest_codes(groups, scales, biases, (1 << bits) - 1).astype(mx.uint32)
    shape = (values.shape[0], values.shape[1] // group_size)
    packed = pack_codes(codes.reshape(values.shape), bits)
    return packed, scales.reshape(shape), biases.reshape(shape)


def float32_weights(arrays: Arrays, source: Quantization | None) -> mx.array:
    """In float32, because in the scales' own type every product would be rounded again."""
    if source is None:
        return arrays["weight"].astype(mx.float32)
    scales, biases = (arrays[name].astype(mx.float32) for name in AFFINE[1:])
    return mx.dequantize(
        arrays["weight"], scales, biases, group_size=source.group_size, bits=source.bits
    )


def scale_dtype(arrays: Arrays, source: Quantization | None) -> mx.Dtype:
    """The type of scales and biases: the source's own."""
    return arrays["weight" if source is None else "scales"].dtype


def not_finite() -> CheckpointError:
    return CheckpointError(
        "Some expert weights are infinite or not a number, so no scale fits them. Pack the "
        "experts without bits.",
        Remedy.PACK_WITHOUT_BITS,
    )


def _spread(importance: Columns | None, values: mx.array, groups: mx.array) -> mx.array | None:
    """Importance for every weight, in groups."""
    if importance is None:
        return None
    require_sound(importance, values.shape[1])
    return mx.broadcast_to(mx.array(importance), values.shape).reshape(groups.shape)
