"""What reading a prompt costs, the first time and again. Its words are drawn at random."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from flash_moe.decode.loop import prefill_chunk
from flash_moe.measure.eviction import Eviction
from flash_moe.model.load import StreamedModel


@dataclass(frozen=True, slots=True)
class Reading:
    """Of a whole prompt: seconds, those of them that went into reading experts, and bytes used."""

    seconds: float
    reading: float
    nbytes: int
    mapped: int


@dataclass(frozen=True, slots=True)
class PromptCost:
    """`first` with nothing cached, where that can be had."""

    tokens: int
    first: Reading
    again: Reading

    def to_json(self) -> dict[str, Any]:
        runs = {"first": self.first, "again": self.again}
        return {
            "tokens": self.tokens,
            **{
                name: {**asdict(run), "tokens_per_second": self.tokens / run.seconds}
                for name, run in runs.items()
            },
        }


def measure_prompt(model: StreamedModel, length: int, words: int, evict: Eviction) -> PromptCost:
    prompt = random.Random(length).choices(range(words), k=length)
    if evict.why_not is None:
        evict()
    return PromptCost(length, _read(model, prompt), _read(model, prompt))


def _read(model: StreamedModel, prompt: list[int]) -> Reading:
    """In chunks, as the loop that makes replies does."""
    counters, phase = model.streamer.reader.counters, model.streamer.phase
    nbytes, mapped, reading = counters.nbytes, counters.mapped, counters.seconds
    start, cache, chunk = time.perf_counter(), model.make_cache(), prefill_chunk(model)
    model.streamer.phase = "prompt"
    try:
        for at in range(0, len(prompt), chunk):
            model.advance(mx.array(prompt[at : at + chunk])[None], cache)
            mx.clear_cache()
    finally:
        model.streamer.phase = phase
    return Reading(
        time.perf_counter() - start,
        counters.seconds - reading,
        counters.nbytes - nbytes,
        counters.mapped - mapped,
    )
