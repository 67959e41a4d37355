"""The model that comes with the package: its folder is a checkpoint like any other."""

from __future__ import annotations

from pathlib import Path

NAME = "flash-moe-tiny"
FOLDER = Path(__file__).parent / NAME
# Conversations, tasks and text that it was not trained on.
HELD_OUT = FOLDER / "heldout"
MODELS = {NAME: FOLDER}
