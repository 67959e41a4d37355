"""Where the plugin's files are: all of them in llm's own user folder."""

from __future__ import annotations

from pathlib import Path

import llm


def home() -> Path:
    return Path(llm.user_dir()) / "llm-flash-moe"


def models() -> Path:
    """Packs and synthetic models made without --to."""
    return home() / "models"


def prompts() -> Path:
    """Saved prompts, for a later command to continue."""
    return home() / "prompts"


def evaluations() -> Path:
    """Evaluations that were interrupted."""
    return home() / "evaluations"


def default_name(path: Path) -> str:
    """Of the model in a folder."""
    return path.expanduser().resolve().name.lower()


def new_folder(name: str, to: Path | None) -> Path:
    """Where a model of this name is written: one folder, so that no model lies inside another."""
    return (to or models()).expanduser().resolve() / name.replace("/", "--")
