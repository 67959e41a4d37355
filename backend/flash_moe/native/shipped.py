"""Libraries that were compiled with the wheel, and lie in the package: the one for this processor.

They are loaded like the package's own code, from beside it. A source tree has none, nor has a wheel
that was built without a compiler: build.py compiles there.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from flash_moe.native.libraries import PROCESSOR, Library, file_name, variants

FOLDER = Path(__file__).with_name("built")


def load(library: Library, folder: Path = FOLDER) -> ctypes.CDLL | None:
    """The best variant that this processor runs, or None."""
    if not folder.is_dir():
        return None
    for variant in reversed(variants(library)):
        file = folder / file_name(library, variant)
        if file.is_file() and (not variant.level or variant.level <= level(folder)):
            try:
                return ctypes.CDLL(str(file))
            except OSError:  # a disk that no programs may run from, or another C library
                return None
    return None


def is_shipped(file: str) -> bool:
    return Path(file).parent == FOLDER


@cache
def level(folder: Path = FOLDER) -> int:
    processor = load(PROCESSOR, folder)
    return 0 if processor is None else int(processor.flash_processor())
