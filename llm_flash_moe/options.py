"""The options of `llm -m … -o`. All are None unless set, so that llm logs what the user chose."""

from __future__ import annotations

import json
from typing import Any

import llm
from pydantic import Field, field_validator

from flash_moe.decode.sampling import Sampling
from flash_moe.errors import FlashMoeError

# As flash_moe.kernels.runtime has them, which imports MLX.
RUNTIMES = ("auto", "metal", "cuda", "native", "mlx")

WEIGHTS = ("keep", "renormalise")

# What a model is loaded with, by the names that flash_moe.model.load.Settings has for it.
SETTINGS = ("experts", "weights", "skip_below", "prefer_cached", "whole", "whole_in", "runtime")
OCCASIONS = ("prompt", "grammar")

OPTION_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


class ModelOptions(llm.Options):
    max_tokens: int | None = Field(None, description="Most tokens to generate (8192)")
    temperature: float | None = Field(None, description="0 to 10; 0 always takes the likeliest (0)")
    top_p: float | None = Field(None, description="Sample from this much probability, 0 to 1")
    top_k: int | None = Field(None, description="Sample from the k likeliest tokens")
    min_p: float | None = Field(
        None, description="Leave out tokens less likely than this share of the likeliest, 0 to 1"
    )
    repetition_penalty: float | None = Field(None, description="Divides repeated tokens' logits")
    presence_penalty: float | None = Field(None, description="Subtracted once per used token")
    frequency_penalty: float | None = Field(None, description="Subtracted per use of a token")
    seed: int | None = Field(None, description="Makes sampling repeatable")
    stop: str | list[str] | None = Field(
        None, description='Text at which the answer ends, or several: ["a", "b"]'
    )
    thinking: bool | None = Field(
        None, description="Think before answering; the model's own default if unset"
    )
    thinking_budget: int | None = Field(
        None, description="Tokens after which a thought is closed and the answer begins"
    )
    context_length: int | None = Field(
        None, description="Most tokens of conversation and reply together (the model's own)"
    )
    experts: int | None = Field(
        None, description="Experts a token uses in each layer: fewer is faster and less exact"
    )
    weights: str | None = Field(
        None,
        description="Weights of fewer experts: keep (the default, where known) those they have "
        "among all, or renormalise, as mlx-lm does",
    )
    skip_below: float | None = Field(
        None, description="Leave out experts, but a token's first, of a smaller weight: 0 to 1"
    )
    prefer_cached: float | None = Field(
        None,
        description="In replies, take a cached expert instead of one that is up to this much "
        "likelier: 0 to 1. Such replies cannot be repeated",
    )
    whole: int | None = Field(
        None,
        description="Of a pack in two planes: experts of a token that are read with all bits, the "
        "weightiest; the others with 2 (all)",
    )
    whole_in: str | None = Field(
        None,
        description="With whole: where all experts have all bits: prompt, grammar (what is held "
        "to one), or both: prompt,grammar",
    )
    runtime: str | None = Field(
        None,
        description=f"Code that computes the experts: {', '.join(RUNTIMES)}. auto takes the "
        "fastest here; mlx is mlx-lm's arithmetic, on a CPU to the bit",
    )
    logprobs: int | None = Field(
        None, description="Log the likelihood of every token, and of this many likeliest ones"
    )
    stats: bool | None = Field(None, description="Print statistics to stderr after the reply")

    @field_validator("max_tokens", "experts", "context_length")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("choose 1 or more")
        return value

    @field_validator("thinking_budget", "logprobs", "whole")
    @classmethod
    def _not_negative(cls, value: int | None) -> int | None:
        if value is not None and value < 0:
            raise ValueError("choose 0 or more")
        return value

    @field_validator("skip_below", "prefer_cached")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise ValueError("choose 0 or more, and less than 1")
        return value

    @field_validator("whole_in")
    @classmethod
    def _occasions(cls, value: str | None) -> str | None:
        if value is not None and set(value.split(",")) - set(OCCASIONS):
            raise ValueError(f"choose {' or '.join(OCCASIONS)}, or both with a comma")
        return value

    @field_validator("stop")
    @classmethod
    def _several(cls, value: str | list[str] | None) -> str | list[str] | None:
        """On the command line every option is text."""
        if isinstance(value, str) and value.startswith("["):
            try:
                listed = json.loads(value)
            except ValueError:
                return value
            if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
                return listed
        return value

    @field_validator("runtime")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value not in (None, *RUNTIMES):
            raise ValueError(f"choose {', '.join(RUNTIMES)}")
        return value

    @field_validator("weights")
    @classmethod
    def _of_experts(cls, value: str | None) -> str | None:
        if value not in (None, *WEIGHTS):
            raise ValueError(f"choose {' or '.join(WEIGHTS)}")
        return value

    @field_validator(*OPTION_NAMES)
    @classmethod
    def _in_range(cls, value: float | None, info: Any) -> float | None:
        try:
            Sampling(**{info.field_name: value})  # type: ignore[arg-type]
        except FlashMoeError as error:
            raise ValueError(str(error)) from error
        return value

    def settings(self, own: int | None = None) -> tuple[tuple[str, Any], ...]:
        """Those that are set, or the model's `own` number of experts."""
        chosen = {name: getattr(self, name) for name in SETTINGS}
        chosen["experts"] = chosen["experts"] or own
        if self.whole_in is not None:
            chosen["whole_in"] = tuple(self.whole_in.split(","))
        return tuple((name, value) for name, value in chosen.items() if value is not None)

    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in OPTION_NAMES})

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
