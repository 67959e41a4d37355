"""What holding a reply to a grammar costs, and what its forced tokens save.

    python backend/benchmarks/constrained.py FOLDER    # of random weights: llm flash-moe synth

Noise at temperature 1 visits states that a trained model rarely reaches, so masks are as expensive
as they get, and this does not show how hard a grammar has to push a real model.
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

from flash_moe.chat.tool_calls import find_tool_format
from flash_moe.decode.constrained import ConstraintStepper
from flash_moe.decode.constraint import Constraint, Mask, Unconstrained
from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.decode.statistics import Stats
from flash_moe.engine import Engine
from flash_moe.grammar.grammar import Grammar
from flash_moe.grammar.vocabulary import vocabulary
from flash_moe.options import Sampling

REPLIES, COMPILES, LONGEST = 20, 20, 400
PLACE = {
    "type": "object",
    "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
    "required": ["lat", "lon"],
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "place": PLACE,
    },
    "required": ["name", "age", "unit", "place"],
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "options": {"anyOf": [PLACE, {"type": "null"}]},
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
        self._constraint, self._seconds, self._forcing = constraint, seconds, forcing

    @property
    def finished(self) -> bool:
        return self._constraint.finished

    @property
    def complete(self) -> bool:
        return self._constraint.complete

    @property
    def holds(self) -> bool:
        return self._constraint.holds

    def mask(self) -> Mask | None:
        start = time.perf_counter()
        mask = self._constraint.mask()
        self._seconds.append(time.perf_counter() - start)
        return mask

    def accept(self, token: int) -> bool:
        return self._constraint.accept(token)

    def forced(self) -> list[int]:
        return self._constraint.forced() if self._forcing else []


def main() -> None:
    engine = Engine.load(Path(sys.argv[1]))
    start = time.perf_counter()
    size = vocabulary(engine.tokenizer).vocab_size
    print(f"vocabulary of {size}: built in {1e3 * (time.perf_counter() - start):.1f} ms, once")
    tool_format = find_tool_format(Path(sys.argv[1]), engine.tokenizer)
    format_name = tool_format.name if tool_format else "unknown"
    grammars: dict[str, Callable[[], Grammar]] = {
        "schema": lambda: Grammar.for_schema(engine.tokenizer, PERSON),
        f"calls ({format_name})": lambda: Grammar.for_tools(engine.tokenizer, TOOLS, tool_format),
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
    replies = [one_reply(engine, grammar, masks, seed, forcing, calls) for seed in range(REPLIES)]
    elapsed = time.perf_counter() - start
    tokens = sum(stats.generated_tokens for stats, _ in replies)
    forced = sum(stats.forced_tokens for stats, _ in replies)
    read = sum(stats.experts_read for stats, _ in replies)
    complete = sum(done for _, done in replies)
    micro = np.array(masks) * 1e6
    print(
        f"  {'forced together' if forcing else 'one by one'}: {complete} of {REPLIES} complete, "
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
    assert start is not None
    assert end is not None
    if calls:
        prompt.append(start)
    constraint = grammar.constraint(prompt)
    assert constraint is not None
    request = TokenRequest(
        prompt=prompt,
        max_tokens=LONGEST,
        sampling=Sampling(temperature=1.0, seed=seed),
        stop_tokens=engine.tokenizer.stop_tokens | {end},
        constraint=Timed(constraint, masks, forcing),
    )
    reply = Generation(engine.model, request)
    for _ in reply:
        pass
    return reply.stats, constraint.complete


def median_seconds(do: Callable[[], Any], times: int) -> float:
    return statistics.median(seconds(do) for _ in range(times))


def seconds(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def apply_seconds(width: int) -> float:
    half: Mask = np.arange(width) % 2 == 0

    class Half(Unconstrained):
        holds = True

        def mask(self) -> Mask:
            return half

    stepper = ConstraintStepper(Half(), Stats())
    logits = mx.random.normal((1, width))
    mx.eval(logits)
    return median_seconds(lambda: mx.eval(stepper.restrict(logits)), 50)


if __name__ == "__main__":
    main()
