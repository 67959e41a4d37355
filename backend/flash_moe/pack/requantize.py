"""Weights to codes of fewer bits: `weight ≈ scale · code + bias`, one scale and bias a group.

`fit` makes the squared error least: in C, or in MLX's operations where there is no C compiler.
`minmax` is the baseline. All round scale and bias to their type before they choose codes, so that
codes fit what will be multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_moe.errors import CheckpointError, OptionError
from flash_moe.format.layout import CODES, Quantization
from flash_moe.machine import usable_cores
from flash_moe.native.build import NativeUnavailable
from flash_moe.pack.affine import extremes, nearest_codes, pack_codes
from flash_moe.pack.fit import BITS, GROUP_SIZES, SOURCE_BITS, SOURCE_GROUPS, NotFinite, load_fit
from flash_moe.pack.fit_mlx import alternating
from flash_moe.pack.recast import Arrays, Columns, Recast

Made = tuple[mx.array, mx.array, mx.array]
# Groups [n, size] in float32, weights alike or none, the largest code, the type of scales → scale
# and bias of each group [n, 1].
Choose = Callable[[mx.array, mx.array | None, int, mx.Dtype], tuple[mx.array, mx.array]]

# What a user may ask for; the names of methods below say in a pack what was done.
ASKED = ("fit", "minmax")
METHODS = ("fit", "fit in MLX", "minmax")


def requantize(
    arrays: Arrays,
    source: Quantization | None,
    bits: int,
    group_size: int,
    method: str = "fit",
    importance: Columns | None = None,
) -> Made:
    """A matrix as mlx-lm has it, affine or not quantized → packed codes, scales, biases.

    `importance` weighs the squared error of each column; with the mean square of what a column is
    multiplied with, that is the error of products, as far as columns are independent.
    """
    dtype = arrays["weight" if source is None else "scales"].dtype
    if method == "fit":
        try:
            return _fit(arrays, source, bits, group_size, dtype, importance)
        except NotFinite as error:
            raise _not_finite() from error
    values = _values(arrays, source)
    groups, largest = values.reshape(-1, group_size), (1 << bits) - 1
    scales, biases = _CHOOSE[method](groups, _weights(values, groups, importance), largest, dtype)
    if not mx.isfinite(scales + biases).all():
        raise _not_finite()
    codes = nearest_codes(groups, scales, biases, largest).astype(mx.uint32)
    shape = (values.shape[0], values.shape[1] // group_size)
    packed = pack_codes(codes.reshape(values.shape), bits)
    return packed, scales.reshape(shape), biases.reshape(shape)


def make_recast(
    bits: int, group_size: int = 64, method: str = "fit", calibration: str | None = None
) -> Recast:
    """What `pack` is to do with the experts, checked. With a `calibration`, which names its text,
    importance is to come before the work is done."""
    for name, value, choices in (
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("method", method, ASKED),
    ):
        if value not in choices:
            raise OptionError(f"{name}={value}: choose {' or '.join(map(str, choices))}.")
    if method == "fit":
        method = _fit_here()
    return Recast(bits, group_size, method, partial(requantize, method=method), calibration)


def _fit_here() -> str:
    try:
        load_fit()
    except NativeUnavailable:
        return "fit in MLX"
    return "fit"


def _fit(
    arrays: Arrays,
    source: Quantization | None,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    importance: Columns | None,
) -> Made:
    """From codes where they are few: then the fit knows which weights are equal."""
    fit, threads = load_fit(), usable_cores()
    if source and source.bits in SOURCE_BITS and source.group_size in SOURCE_GROUPS:
        made = fit.codes(
            *(_to_numpy(arrays[name]) for name in CODES),
            source_bits=source.bits,
            source_group=source.group_size,
            bits=bits,
            group_size=group_size,
            importance=importance,
            threads=threads,
        )
    else:
        made = fit.values(
            _to_numpy(_values(arrays, source)),
            bits=bits,
            group_size=group_size,
            scale_type=str(dtype).rpartition(".")[2],
            importance=importance,
            threads=threads,
        )
    codes, scales, biases = map(mx.array, made)
    return codes, scales.view(dtype), biases.view(dtype)


def _minmax(
    groups: mx.array, weights: mx.array | None, largest: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    if weights is not None:
        raise OptionError("importance: minmax looks at extremes alone. Use the method fit.")
    return extremes(groups, largest, dtype)


_CHOOSE: dict[str, Choose] = {"fit in MLX": alternating, "minmax": _minmax}


def _values(arrays: Arrays, source: Quantization | None) -> mx.array:
    """The weights in float32: in the scales' own type, every product would be rounded again."""
    if source is None:
        return arrays["weight"].astype(mx.float32)
    scales, biases = (arrays[name].astype(mx.float32) for name in CODES[1:])
    return mx.dequantize(
        arrays["weight"], scales, biases, group_size=source.group_size, bits=source.bits
    )


def _weights(values: mx.array, groups: mx.array, importance: Columns | None) -> mx.array | None:
    if importance is None:
        return None
    require_sound(importance, values.shape[1])
    return mx.broadcast_to(mx.array(importance), values.shape).reshape(groups.shape)


def require_sound(importance: Columns, columns: int) -> None:
    sound = bool((np.isfinite(importance) & (importance >= 0)).all())
    if importance.shape != (columns,) or not sound:
        raise ValueError(
            f"importance has shape {list(importance.shape)} for {columns} columns, or numbers "
            "that are negative or not finite"
        )


def _to_numpy(array: mx.array) -> npt.NDArray[Any]:
    """numpy has no bfloat16: its bits, as uint16."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(plain, copy=False)


def _not_finite() -> CheckpointError:
    return CheckpointError(
        "Some expert weights are infinite or not a number, which no scale fits. Pack the experts "
        "as they are: leave out --bits"
    )
