"""The fit in C, typed: arguments are checked here, so that no call can leave its arrays.

Arrays are numpy's; bfloat16 scales are given and returned as uint16. Rows are cut into pieces for
threads, which C knows nothing of: the result is the same for any number of them.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flash_moe.kernels.spec import SCALE_TYPES
from flash_moe.native.arguments import require, require_array
from flash_moe.native.build import Library, build
from flash_moe.pack.cuts import table

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]
Scales = npt.NDArray[Any]
Fitted = tuple[U32, Scales, Scales]

BITS = (2, 3, 4)
GROUP_SIZES = (64, 128)
# Codes with more bits are given as values: their histogram would have more bins than points.
SOURCE_BITS = (3, 4)
SOURCE_GROUPS = (32, 64, 128)
STORED = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
MOST_THREADS = 256
# A code of 4 bits is a bin. Of values, more bins give a better start and take longer: for 2 bits,
# 16, 24 and 32 end 0.2, 0.1 and 0.04 % above the optimum of Gaussian weights, at 0.33, 0.29 and
# 0.22 GB/s of bfloat16 a core (Zen 5). The sampled tables for more bits hardly grow with them.
CODE_BINS = 16
VALUE_BINS = {2: 24, 3: 64, 4: 64}
# 1 ms or so: threads end together, and the interpreter has little to do.
PIECE = 4096

LIBRARY = Library(
    "fit",
    "the quantizer",
    tuple(Path(__file__).with_name(name) for name in ("fit.c", "fit_numbers.h")),
)


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
        """Fewer bits for affine codes: packed codes uint32, scales, biases.

        For 2 bits, in groups that are not larger than the source's, that is the global optimum of
        the (weighted) squared error, up to the rounding of scale and bias to their type; a bias is
        fitted to the scale that was rounded.
        """
        require(source_bits in SOURCE_BITS, f"source_bits={source_bits}: choose 3 or 4")
        known = source_group in SOURCE_GROUPS
        require(known, f"source_group={source_group} is not among {SOURCE_GROUPS}")
        _check_choice(bits, group_size)
        require(bits < source_bits, f"bits={bits} are not fewer than source_bits={source_bits}")
        found = [name for name, kind in STORED.items() if getattr(scales, "dtype", None) == kind]
        require(len(found) == 1, "scales are not uint16 (bfloat16), float16 or float32")
        kind = found[0]
        require(scales.ndim == 2, f"scales have {scales.ndim} dimensions, not 2")
        rows, columns = len(scales), scales.shape[1] * source_group
        weight = require_array("weight", weight, np.uint32, (rows, columns * source_bits // 32))
        biases = require_array("biases", biases, STORED[kind], scales.shape)
        whole = columns % group_size == 0
        require(whole, f"there are {columns} columns: not whole groups of group_size={group_size}")
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
        )
        per_row = columns // group_size
        return self._run(job, rows, per_row, bits, group_size, kind, importance, threads)

    def values(
        self,
        values: F32,
        *,
        bits: int,
        group_size: int,
        scale_type: str,
        importance: F32 | None = None,
        threads: int = 1,
    ) -> Fitted:
        """The same for weights [rows, columns]: a good fit, not always the best one."""
        _check_choice(bits, group_size)
        require(scale_type in STORED, f"scale_type={scale_type!r} is not among {SCALE_TYPES}")
        values = require_array("values", values, np.float32, (-1, -1))
        rows, columns = values.shape
        whole = columns % group_size == 0
        require(
            whole, f"values have {columns} columns: not whole groups of group_size={group_size}"
        )
        job = _Fit(source=values.ctypes.data, parts=0)
        per_row = columns // group_size
        return self._run(job, rows, per_row, bits, group_size, scale_type, importance, threads)

    def _run(
        self,
        job: _Fit,
        rows: int,
        per_row: int,
        bits: int,
        group_size: int,
        kind: str,
        importance: F32 | None,
        threads: int,
    ) -> Fitted:
        """Also keeps alive what `job` points to, but for the source."""
        require(1 <= threads <= MOST_THREADS, f"threads={threads}: not 1 to {MOST_THREADS}")
        if importance is not None:
            importance = require_array(
                "importance", importance, np.float32, (per_row * group_size,)
            )
            sound = bool(np.isfinite(importance).all() and (importance >= 0).all())
            require(sound, "importance has numbers that are negative or not finite")
            job.importance = importance.ctypes.data
        job.bins = CODE_BINS if job.parts == 1 else VALUE_BINS[bits]
        cuts = table(bits, job.bins)
        codes = np.empty((rows, per_row * group_size * bits // 32), np.uint32)
        scales, biases = (np.empty((rows, per_row), STORED[kind]) for _ in range(2))
        job.table, job.cuts = cuts.ctypes.data, len(cuts)
        job.codes, job.scales, job.biases = (a.ctypes.data for a in (codes, scales, biases))
        job.group, job.bits, job.type = group_size, bits, SCALE_TYPES.index(kind)
        job.groups_per_row = per_row
        pieces = [(at, min(at + PIECE, rows * per_row)) for at in range(0, rows * per_row, PIECE)]
        call = partial(self._library.flash_fit, ctypes.addressof(job))
        if threads == 1 or len(pieces) < 2:
            failed = max((call(*piece) for piece in pieces), default=0)
        else:
            with ThreadPoolExecutor(min(threads, len(pieces))) as pool:
                failed = max(pool.map(call, *zip(*pieces, strict=True)))
        if failed:
            raise NotFinite("there are weights that are not finite")
        return codes, scales, biases


@cache
def load_fit(extra_flags: tuple[str, ...] = ()) -> Fit:
    """Compiled on the first use on a machine, some seconds long. Raises NativeUnavailable."""
    return Fit(build(LIBRARY, extra_flags))


def _check_choice(bits: int, group_size: int) -> None:
    require(bits in BITS, f"bits={bits} are not among {BITS}")
    require(group_size in GROUP_SIZES, f"group_size={group_size} is not among {GROUP_SIZES}")
