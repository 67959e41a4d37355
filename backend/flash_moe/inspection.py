"""Looks at a model's folder without loading it: what it is, what it needs, whether it is sound."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flash_moe.callbacks import Advance, no_advance
from flash_moe.checkpoint.folder import Folder, open_folder
from flash_moe.errors import OptionError
from flash_moe.format.manifest import Requantized, requantized, verify

if TYPE_CHECKING:
    from flash_moe.checkpoint.plan import Plan


class Checkpoint:
    """A checkpoint as downloaded, or a pack. Nothing is read before it is asked for, and only a
    plan needs MLX."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def folder(self) -> Folder:
        """CheckpointError if it is not what it claims to be."""
        return open_folder(self.path)

    @property
    def nbytes(self) -> int:
        """What the weights take on disk."""
        return self.folder.nbytes

    @property
    def requantized(self) -> Requantized | None:
        """How a pack's experts differ from their source's; None also for a broken pack."""
        return requantized(self.path)

    def plan(self, experts: int | None = None) -> Plan:
        """What it needs with so many experts a token, or with its own number of them."""
        from flash_moe.checkpoint.plan import plan_folder

        return plan_folder(self.folder, experts)

    def require_tokenizer(self) -> None:
        """CheckpointError, if there is no tokenizer that can be used."""
        from flash_moe.chat.tokenizer import load_tokenizer

        load_tokenizer(self.path)

    def verify(self, progress: Advance = no_advance) -> list[str]:
        """Read a pack against its checksums: one sentence for each fault."""
        if self.folder.manifest is None:
            raise OptionError(
                f"{self.path} is used as downloaded: only packs carry checksums to verify."
            )
        return verify(self.path, self.folder.manifest, progress)
