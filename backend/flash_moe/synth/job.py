"""A synthetic model as users ask for it: a named shape, with some of its numbers changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from flash_moe.callbacks import Advance, no_advance
from flash_moe.errors import OptionError
from flash_moe.synth.model import SHAPES, Shape, nbytes, synthesize


@dataclass(frozen=True, slots=True)
class SynthJob:
    """A planned model of random weights; `write` makes it."""

    shape: Shape
    bits: int
    dtype: str
    seed: int

    @classmethod
    def plan(
        cls,
        shape: str = "small",
        *,
        layers: int | None = None,
        experts: int | None = None,
        bits: int = 4,
        seed: int = 0,
    ) -> SynthJob:
        """`small` is a demo, `397b` has the true widths of Qwen3.5-397B-A17B."""
        if shape not in SHAPES:
            raise OptionError(f"shape={shape}: choose {' or '.join(SHAPES)}.")
        own = SHAPES[shape]
        changed = replace(own, layers=layers or own.layers, experts=experts or own.experts)
        # A token cannot use more experts than there are.
        k = min(changed.experts_per_token, changed.experts)
        dtype = "float32" if shape == "small" else "bfloat16"
        return cls(replace(changed, experts_per_token=k), bits, dtype, seed)

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, bits=self.bits, dtype=self.dtype)

    def write(self, target: Path, progress: Advance = no_advance) -> None:
        synthesize(
            target,
            self.shape,
            bits=self.bits,
            dtype=self.dtype,
            seed=self.seed,
            progress=progress,
        )
