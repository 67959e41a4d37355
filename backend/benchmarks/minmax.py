"""The baseline of all quantizers: the smallest and the largest weight of a group are the outermost
levels. Packs of flash_moe were once offered with it; now it is here to compare with."""

from __future__ import annotations

from flash_moe.format.layout import Quantization
from flash_moe.pack.affine import extremes
from flash_moe.pack.fewer_bits import FewerBits
from flash_moe.pack.requantize import Matrix, encode, float32_weights, scale_dtype
from flash_moe.pack.transform import Arrays, Columns


def minmax(
    arrays: Arrays,
    source: Quantization | None,
    bits: int,
    group_size: int,
    importance: Columns | None = None,
) -> Matrix:
    if importance is not None:
        raise ValueError("importance: min/max looks at extremes alone")
    values = float32_weights(arrays, source)
    groups, dtype = values.reshape(-1, group_size), scale_dtype(arrays, source)
    return encode(values, *extremes(groups, (1 << bits) - 1, dtype), bits, group_size)


def by_minmax(bits: int, group_size: int = 64) -> FewerBits:
    """As a transform of packs, with the name that their manifests have for it."""
    return FewerBits(bits, group_size, "minmax", minmax)
