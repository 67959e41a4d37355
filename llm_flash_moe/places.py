"""Where things are kept: all of it in llm's own user folder."""

from __future__ import annotations

from pathlib import Path

import llm

from flash_moe import built_in
from llm_flash_moe.errors import PluginError
from llm_flash_moe.registry import Entry, Registry


def home() -> Path:
    return Path(llm.user_dir()) / "llm-flash-moe"


def packs() -> Path:
    """Packs and synthetic models made without --to."""
    return home() / "models"


def registry() -> Registry:
    models = {name: Entry(str(path)) for name, path in built_in.MODELS.items()}
    return Registry(home() / "models.json", models)


def default_name(path: Path) -> str:
    """Of a model that is in this folder."""
    return path.expanduser().resolve().name.lower()


def new_folder(name: str, to: Path | None) -> Path:
    """Where a model of this name is written: one folder, so that no model lies inside another."""
    return (to or packs()).expanduser().resolve() / name.replace("/", "--")


def folder(name: str, entry: Entry) -> Path:
    """The folder of a known model, if it is still there."""
    path = Path(entry.path)
    if not path.is_dir():
        raise PluginError(
            f"The folder of {name!r} is gone: {path}. Put it back, or forget the model: "
            f"llm flash-moe remove {name}"
        )
    return path


def find(name: str) -> tuple[Path, int | None]:
    """The folder and K of a known model, or of a checkpoint that is named by its folder."""
    known = registry().entries()
    path = Path(name).expanduser()
    if name not in known and path.is_dir():
        return path.resolve(), None
    entry = registry().get(name)
    return folder(name, entry), entry.experts
