"""Where things are kept: all of it in llm's own user folder."""

from __future__ import annotations

from pathlib import Path

import llm

from flash_moe.checkpoint.registry import Registry


def home() -> Path:
    return Path(llm.user_dir()) / "llm-flash-moe"


def packs() -> Path:
    """Packs and synthetic models made without --to."""
    return home() / "models"


def registry() -> Registry:
    return Registry(home() / "models.json")
