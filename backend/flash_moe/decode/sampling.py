"""How the next token is chosen. The mathematics is mlx-lm's; the ranges and the words are ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from flash_moe.errors import OptionError

Sampler = Callable[[Any], Any]

# Field → (lowest, highest); both ends allowed.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_p": (0, 1),
    "top_k": (0, 1_000_000),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """None leaves mlx-lm's default: greedy, no filter, no penalty."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = RANGES[field.name]
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise OptionError(f"{field.name}={value}: choose {low:g} to {high:g}.")

    def sampler(self) -> Sampler:
        """Log-probabilities [1, vocabulary] → token [1]. Seeds MLX if a seed is set."""
        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler

        if self.seed is not None:
            mx.random.seed(self.seed)
        sampler: Sampler = make_sampler(
            temp=self.temperature or 0.0,
            top_p=self.top_p or 0.0,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
        )
        return sampler

    def processors(self) -> list[Callable[[Any, Any], Any]]:
        """Functions of (tokens so far, logits) that apply the penalties."""
        from mlx_lm.sample_utils import make_logits_processors

        found: list[Callable[[Any, Any], Any]] = make_logits_processors(
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
        return found
