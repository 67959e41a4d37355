"""The fit in C, typed: arguments are checked here, so that no call can leave its arrays.

Arrays are numpy's; bfloat16 scales are passed and returned as uint16. Rows are cut into pieces for
threads, of which C knows nothing: the result is the same for any number of them.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from flash_moe.format.dtypes import BY_NAME
from flash_moe.kernels.spec import F32, SCALE_TYPES, U32
from flash_moe.native.arguments import require, require_array
from flash_moe.native.build import build
from flash_moe.native.libraries import FIT
from flash_moe.options import PACK_BITS, PACK_GROUP_SIZES
from flash_moe.pack.cuts import table

Scales = npt.NDArray[Any]
# Packed codes uint32, scales, biases.
Fitted = tuple[U32, Scales, Scales]

# Codes with more bits are given as values: their histogram would have more bins than points.
SOURCE_BITS = (3, 4)
SOURCE_GROUPS = (32, 64, 128)
MOST_THREADS = 256
# A code of 4 bits is a bin. More bins for values give a better start and take longer: for 2 bits,
# 16, 24 and 32 end 0.2, 0.1 and 0.04 % above the optimum of Gaussian weights, at 0.33, 0.29 and
# 0.22 GB/s of bfloat16 a core (Zen 5). The sampled tables for more bits hardly grow with them.
CODE_BINS = 16
VALUE_BINS = {2: 24, 3: 64, 4: 64}
# About 1 ms: threads end together, and the interpreter has little to do.
PIECE = 4096


class NotFinite(ValueError):
    """A weight is infinite or not a number."""


class _Fit(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("source", "source_scales", "source_biases", "importance", "table"),
                *("codes", "scales", "biases"),
            )
        ),
        ("groups_per_row", ctypes.c_uint64),
        *(
            (name, ctypes.c_uint32)
            for name in ("group", "parts", "source_bits", "bits", "type", "bins", "cuts")
        ),
    )


class Fit:
    """The fit of one compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.flash_fit.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
        self._library = library

    def codes(
        self,
        weight: U32,
        scales: Scales,
        biases: Scales,
        *,
        source_bits: int,
        source_group: int,
        bits: int,
        group_size: int,
        importance: F32 | None = None,
        threads: int = 1,
    ) -> Fitted:
        """Fewer bits for affine codes.

        For 2 bits, in groups that are not larger than the source's, this is the global optimum of
        the (weighted) squared error, up to the rounding of scale and bias to their type; the bias
        is fitted to the rounded scale.
        """
        require(source_bits in SOURCE_BITS, f"source_bits={source_bits}: choose 3 or 4")
        known = source_group in SOURCE_GROUPS
        require(known, f"source_group={source_group} is not among {SOURCE_GROUPS}")
        require(bits < source_bits, f"bits={bits} are not fewer than source_bits={source_bits}")
        kind = _scale_type(scales)
        rows, columns = len(scales), scales.shape[1] * source_group
        _require_choice(bits, group_size, columns)
        weight = require_array("weight", weight, np.uint32, (rows, columns * source_bits // 32))
        biases = require_array("biases", biases, scales.dtype, scales.shape)
        # A larger group of the source is several, with the same scale.
        times = max(1, source_group // group_size)
        scales, biases = (
            np.repeat(part, times, axis=1) if times > 1 else np.ascontiguousarray(part)
            for part in (scales, biases)
        )
        job = _Fit(
            source=weight.ctypes.data,
            source_scales=scales.ctypes.data,
            source_biases=biases.ctypes.data,
            source_bits=source_bits,
            parts=max(1, group_size // source_group),
            bits=bits,
            group=group_size,
        )
        # With several groups of the source in one, points are more than codes.
        job.bins = CODE_BINS if job.parts == 1 else VALUE_BINS[bits]
        return self._run(job, (rows, columns), kind, importance, threads)

    def values(
        self,
        values: F32,
        *,
        bits: int,
        group_size: int,
        scale_type: str,
        importance: F32 | None = None,
        threads: int = 1,
        bins: int | None = None,
    ) -> Fitted:
        """The same for weights [rows, columns]: a good fit, not always the best one. `bins` are
        VALUE_BINS unless someone measures others."""
        require(scale_type in SCALE_TYPES, f"scale_type={scale_type!r} is not among {SCALE_TYPES}")
        values = require_array("values", values, np.float32, (-1, -1))
        _require_choice(bits, group_size, values.shape[1])
        job = _Fit(source=values.ctypes.data, parts=0, bits=bits, group=group_size)
        job.bins = VALUE_BINS[bits] if bins is None else bins
        return self._run(job, values.shape, scale_type, importance, threads)

    def _run(
        self,
        job: _Fit,
        shape: tuple[int, ...],
        scale_type: str,
        importance: F32 | None,
        threads: int,
    ) -> Fitted:
        """Keeps alive what `job` points to, except the source."""
        require(1 <= threads <= MOST_THREADS, f"threads={threads}: not 1 to {MOST_THREADS}")
        rows, columns = shape
        if importance is not None:
            importance = require_array("importance", importance, np.float32, (columns,))
            sound = bool(np.isfinite(importance).all() and (importance >= 0).all())
            require(sound, "importance has numbers that are negative or not finite")
            job.importance = importance.ctypes.data
        cuts = table(job.bits, job.bins)
        job.groups_per_row = columns // job.group
        codes = np.empty((rows, columns * job.bits // 32), np.uint32)
        of_groups, dtype = (rows, job.groups_per_row), BY_NAME[scale_type].numpy
        scales, biases = np.empty(of_groups, dtype), np.empty(of_groups, dtype)
        job.table, job.cuts = cuts.ctypes.data, len(cuts)
        job.codes, job.scales, job.biases = (a.ctypes.data for a in (codes, scales, biases))
        job.type = SCALE_TYPES.index(scale_type)
        self._call(job, rows * job.groups_per_row, threads)
        return codes, scales, biases

    def _call(self, job: _Fit, groups: int, threads: int) -> None:
        pieces = [(at, min(at + PIECE, groups)) for at in range(0, groups, PIECE)]
        call = partial(self._library.flash_fit, ctypes.addressof(job))
        if threads == 1 or len(pieces) < 2:
            failed = max((call(*piece) for piece in pieces), default=0)
        else:
            with ThreadPoolExecutor(min(threads, len(pieces))) as pool:
                failed = max(pool.map(call, *zip(*pieces, strict=True)))
        if failed:
            raise NotFinite("there are weights that are not finite")


@cache
def load_fit(extra_flags: tuple[str, ...] = ()) -> Fit:
    """Where the package has none, compiled at the first use on a machine. Raises
    NativeUnavailable."""
    return Fit(build(FIT, extra_flags))


def _scale_type(scales: Scales) -> str:
    dtype = getattr(scales, "dtype", None)
    kinds = [name for name in SCALE_TYPES if BY_NAME[name].numpy == dtype]
    require(len(kinds) == 1, "scales are not uint16 (bfloat16), float16 or float32")
    require(scales.ndim == 2, f"scales have {scales.ndim} dimensions, not 2")
    return kinds[0]


def _require_choice(bits: int, group_size: int, columns: int) -> None:
    require(bits in PACK_BITS, f"bits={bits} are not among {PACK_BITS}")
    known = group_size in PACK_GROUP_SIZES
    require(known, f"group_size={group_size} is not among {PACK_GROUP_SIZES}")
    whole = columns % group_size == 0
    require(whole, f"{columns} columns are not whole groups of group_size={group_size}")
