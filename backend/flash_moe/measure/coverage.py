"""Which layers of a model the kernels compute, and why the others are left to MLX: from headers."""

from __future__ import annotations

from pathlib import Path

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.kernels.coverage import why_unsupported


def left_to_mlx(path: Path) -> dict[str, str | None]:
    """For every switch layer why it is left to MLX, or None if the kernels compute it."""
    skeleton = open_skeleton(open_folder(path))
    return {
        layer: why_unsupported(switch, skeleton.layout(layer))
        for layer, switch in skeleton.switches.items()
    }
