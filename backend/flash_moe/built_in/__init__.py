"""The model that comes with the package: its folder is a checkpoint like any other."""

from __future__ import annotations

from pathlib import Path

NAME = "flash-moe-tiny"
# Name → folder.
BUILT_IN = {NAME: Path(__file__).parent / NAME}
# Conversations, tasks and text that it was not trained on.
HELD_OUT = BUILT_IN[NAME] / "heldout"
