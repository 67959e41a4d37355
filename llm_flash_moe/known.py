"""Models that have a name before they are on the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Known:
    """`experts` is the K that it gets unless another is asked for."""

    repository: str
    experts: int | None = None


FLAGSHIP = "flash-moe-397b"
KNOWN = {FLAGSHIP: Known("mlx-community/Qwen3.5-397B-A17B-4bit", experts=4)}
