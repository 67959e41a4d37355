"""Functions that MLX compiles for a CPU, with g++, into a folder that all users of a machine share.

Whoever was first owns it: MLX 0.32.4 fails for everybody else, and would load what they put there.
Then it computes the same functions without compiling them.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from flash_moe.native.build import is_ours


def compile_only_among_ourselves() -> None:
    """Before anything is computed. On a GPU nothing is compiled there."""
    if mx.default_device() != mx.cpu:
        return
    top = Path(tempfile.gettempdir()) / "mlx"
    with suppress(OSError):
        top.mkdir(mode=0o700, exist_ok=True)
    folders = (top, top / version("mlx"), top / version("mlx") / "cpu")
    if not all(_is_good(folder) for folder in folders):
        mx.disable_compile()


def _is_good(folder: Path) -> bool:
    try:
        return is_ours(folder) and os.access(folder, os.W_OK)
    except FileNotFoundError:
        return True
    except OSError:
        return False
