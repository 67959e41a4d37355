"""What holding a reply to a grammar costs, and what its forced tokens save.

    python backend/benchmarks/constrained.py FOLDER    # of random weights: llm flash-moe synth

Noise at temperature 1 visits states that a trained model seldom does, so masks are at their
dearest and nothing here says how hard a grammar has to push a real model.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.chat.tool_calls import tool_format
from flash_moe.decode.constrained import Guide
from flash_moe.decode.loop import Generation
from flash_moe.decode.sampling import Sampling
from flash_moe.decode.statistics import Stats
from flash_moe.engine import Engine
from flash_moe.grammar.constraints import Constraint, Mask
from flash_moe.grammar.grammar import Grammar
from flash_moe.grammar.vocabulary import vocabulary

REPLIES, COMPILES, LONGEST = 20, 20, 400
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "place": {
            "type": "object",
            "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
            "required": ["lat", "lon"],
        },
    },
    "required": ["name", "age", "unit", "place"],
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "options": {"anyOf": [PERSON["properties"]["place"], {"type": "null"}]},
    },
    "required": ["city", "days"],
}
SQL = {
    "type": "object",
    "properties": {"query": {"type": "string", "maxLength": 60}},
    "required": ["query"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "run_sql", "parameters": SQL}},
]


class Timed:
    """A constraint that notes how long each mask took, and may leave forcing to the mask."""

    def __init__(self, constraint: Constraint, seconds: list[float], forcing: bool) -> None:
        self._constraint, self._seconds = constraint, seconds
        self.accept = constraint.accept
        self.forced = constraint.forced if forcing else list

    @property
    def finished(self) -> bool:
        return self._constraint.finished

    @property
    def complete(self) -> bool:
        return self._constraint.complete

    def mask(self) -> Mask | None:
        start = time.perf_counter()
        mask = self._constraint.mask()
        self._seconds.append(time.perf_counter() - start)
        return mask


def main() -> None:
    engine = Engine.load(Path(sys.argv[1]))
    start = time.perf_counter()
    size = vocabulary(engine.tokenizer).vocab_size
    print(f"vocabulary of {size}: made in {1e3 * (time.perf_counter() - start):.1f} ms, once")
    form = tool_format(Path(sys.argv[1]), engine.tokenizer)
    grammars: dict[str, Callable[[], Grammar]] = {
        "schema": lambda: Grammar.for_schema(engine.tokenizer, PERSON),
        f"calls ({form.name if form else 'unknown'})": lambda: Grammar.for_tools(
            engine.tokenizer, TOOLS, form
        ),
    }
    for name, compile_it in grammars.items():
        print(f"{name}: compiled in {1e3 * median_seconds(compile_it, COMPILES):.2f} ms")
        for forcing in (True, False):
            report(engine, compile_it(), forcing, name.startswith("calls"))
    for width in (2048, 248_320):
        print(f"mask applied to {width} logits: {1e3 * apply_seconds(width):.2f} ms")


def report(engine: Engine, grammar: Grammar, forcing: bool, calls: bool) -> None:
    one_reply(engine, grammar, [], REPLIES, forcing, calls)
    masks: list[float] = []
    start = time.perf_counter()
    found = [one_reply(engine, grammar, masks, seed, forcing, calls) for seed in range(REPLIES)]
    elapsed = time.perf_counter() - start
    tokens = sum(stats.generated_tokens for stats, _ in found)
    forced = sum(stats.forced_tokens for stats, _ in found)
    read = sum(stats.experts_read for stats, _ in found)
    whole = sum(complete for _, complete in found)
    micro = np.array(masks) * 1e6
    print(
        f"  {'forced together' if forcing else 'one by one'}: {whole} of {REPLIES} whole, "
        f"{tokens} tokens, {forced} forced; masks {len(masks)}: mean {micro.mean():.0f} us, "
        f"p50 {np.percentile(micro, 50):.0f}, p95 {np.percentile(micro, 95):.0f}, "
        f"max {micro.max():.0f}; {1e3 * elapsed / tokens:.2f} ms and "
        f"{read / tokens:.1f} experts read a token, all with prompts"
    )


def one_reply(
    engine: Engine, grammar: Grammar, masks: list[float], seed: int, forcing: bool, calls: bool
) -> tuple[Stats, bool]:
    messages = [{"role": "user", "content": "?"}]
    prompt = engine.tokenizer.encode_chat(messages, enable_thinking=False)
    start, end = map(engine.tokenizer.tokenizer.token_to_id, ("<tool_call>", "</tool_call>"))
    if calls:
        prompt.append(start)
    constraint = grammar.constraint(prompt)
    assert constraint is not None
    tokens = Generation(
        engine.model,
        prompt,
        max_tokens=LONGEST,
        sampling=Sampling(temperature=1.0, seed=seed),
        stop_tokens=engine.tokenizer.stop_tokens | {end},
        constraint=Timed(constraint, masks, forcing),
    )
    list(tokens)
    return tokens.stats, constraint.complete


def median_seconds(do: Callable[[], Any], times: int) -> float:
    return statistics.median(seconds(do) for _ in range(times))


def seconds(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def apply_seconds(width: int) -> float:
    half = np.arange(width) % 2 == 0

    class Half(Constraint):
        finished = complete = False

        def mask(self) -> Mask:
            return half

    guide = Guide(Half(), Stats())
    logits = mx.random.normal((1, width))
    mx.eval(logits)
    return median_seconds(lambda: mx.eval(guide.restrict(logits)), 50)


if __name__ == "__main__":
    main()
