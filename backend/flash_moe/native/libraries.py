"""What is written in C, and how it is compiled: on a user's machine for that very processor, or
with a wheel, once for each kind of processor. Imports nothing that the build of a wheel lacks."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

ENGINE = Path(__file__).parents[1]
# No contraction: the compiler would fuse a product and a sum in one place and not in another, and
# results would depend on the batch. errno of expf is of no use and keeps it out of line.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-pthread",
)


@dataclass(frozen=True, slots=True)
class Library:
    """The first source is compiled and includes the others. `name` is that of the file, `title`
    what messages call it. `vectors`: it is faster on a processor with wider ones."""

    name: str
    title: str
    sources: tuple[Path, ...]
    vectors: bool = True

    def source(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.sources)


POOL = ENGINE / "native" / "pool.h"
KERNELS = Library(
    "native",
    "the native kernels",
    (
        *(
            ENGINE / "kernels" / f"native{rest}"
            for rest in (".c", "_attention.h", "_delta.h", "_product.h", "_simd.h")
        ),
        POOL,
    ),
)
READER = Library(
    "reading",
    "the reader",
    (ENGINE / "stream" / "reading.c", ENGINE / "stream" / "mapping.h", POOL),
    vectors=False,
)
FIT = Library(
    "fit", "the quantizer", (ENGINE / "pack" / "fit.c", ENGINE / "pack" / "fit_numbers.h")
)
PROCESSOR = Library(
    "processor", "a look at it", (ENGINE / "native" / "processor.c",), vectors=False
)
ALL = (KERNELS, READER, FIT, PROCESSOR)


@dataclass(frozen=True, slots=True)
class Variant:
    """For processors whose level, as processor.c tells it, is at least this."""

    name: str
    level: int
    flags: tuple[str, ...] = ()


_AVX2 = ("-mavx2", "-mfma", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# The best one last.
VARIANTS = {
    "x86_64": (
        Variant("sse2", 0),
        Variant("avx2", 1, _AVX2),
        Variant("avx512", 2, (*_AVX2, *_AVX512)),
    ),
    "arm64": (Variant("neon", 0),),
}


def variants(library: Library, machine: str | None = None) -> tuple[Variant, ...]:
    """Of a library, for a machine as `platform.machine` calls it; the best one last."""
    machine = platform.machine() if machine is None else machine
    found = VARIANTS.get({"aarch64": "arm64", "AMD64": "x86_64"}.get(machine, machine), ())
    return found if library.vectors else found[:1]


def file_name(library: Library, variant: Variant) -> str:
    """With a hash of all that decides what the file does: one of another version has another."""
    inputs = repr((library.source(), FLAGS, variant.flags)).encode()
    return f"{library.name}-{variant.name}-{hashlib.sha256(inputs).hexdigest()[:16]}.so"
