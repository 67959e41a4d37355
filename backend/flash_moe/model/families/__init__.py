"""One file for each block of mlx-lm's whose formula we know; adding one is adding a file here."""

from __future__ import annotations

import mlx.nn as nn

from flash_moe.model.families.qwen3_moe import Qwen3MoeMixture
from flash_moe.model.families.qwen3_next import Qwen3NextMixture
from flash_moe.model.mixture import Mixture

FAMILIES: tuple[type[Mixture], ...] = (Qwen3NextMixture, Qwen3MoeMixture)


def family_of(block: nn.Module) -> type[Mixture] | None:
    """The family of a module, or None if it is no block of a known one."""
    return next((family for family in FAMILIES if family.stands_for(block)), None)
