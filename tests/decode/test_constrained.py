"""Grammars on a model of random weights: every reply that comes to its end is valid.

At temperature 1 such a model tries everything that the mask allows. `make test ARGS='-m slow'`
runs the long versions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.chat.tool_calls import ToolFormat, find_tool_format
from flash_moe.decode.constraint import Constraint, Unconstrained
from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.decode.statistics import Stats
from flash_moe.evaluation.json_schema import check_schema, faults
from flash_moe.grammar.grammar import Grammar
from flash_moe.model.load import load
from flash_moe.options import Phase, Sampling, Settings
from flash_moe.synth.model import Shape, synthesize
from tests.grammar.schemas import schemas, tools

# Replies end within a tenth of this, or never, inside a key or a number that the model made up.
ENOUGH = 400
JSON_CALLS = ToolFormat("json_tools", "<tool_call>", "</tool_call>", json_tools.parse_tool_call)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["name", "age", "unit"],
}
UNIT = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
QUERY = {"type": "object", "properties": {"sql": {"type": "string", "maxLength": 20}}}
TOOLS = [{"type": "function", "function": {"name": "run_sql", "parameters": QUERY}}]


class Noise:
    """A model of random weights, whose head is wider than its tokenizer, as real ones are."""

    def __init__(self, folder: Path) -> None:
        synthesize(
            folder, Shape(layers=4, experts=8, hidden=128, intermediate=128, vocabulary=1100)
        )
        self.folder = folder
        self.model = load(folder, Settings(bank_bytes=1))
        self.tokenizer = load_tokenizer(folder)

    def prompt(self, *, thinking: bool = False) -> list[int]:
        messages = [{"role": "user", "content": "?"}]
        return self.tokenizer.encode_chat(messages, enable_thinking=thinking)

    def reply(
        self,
        prompt: list[int],
        constraint: Constraint | None,
        chunk: int | None = None,
        **changes: Any,
    ) -> Generation:
        options = {"max_tokens": ENOUGH, "stop_tokens": self.tokenizer.stop_tokens, **changes}
        request = TokenRequest(prompt, constraint=constraint, **options)
        return Generation(self.model, request, chunk=chunk)

    def text(self, ids: list[int]) -> str:
        """With the tokens that mark thoughts and calls."""
        text: str = self.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def tool_format(self) -> ToolFormat:
        tool_format = find_tool_format(self.folder, self.tokenizer)
        assert tool_format is not None
        return tool_format


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Noise:
    return Noise(tmp_path_factory.mktemp("constrained") / "model")


def warm(seed: int) -> Sampling:
    return Sampling(temperature=1.0, seed=seed)


def check_reply(noise: Noise, schema: dict[str, Any], seed: int) -> None:
    check_schema(schema)
    prompt = noise.prompt()
    constraint = Grammar.for_schema(noise.tokenizer, schema).constraint(prompt)
    assert constraint is not None
    generation = noise.reply(prompt, constraint, sampling=warm(seed))
    text = noise.text(list(generation))
    assert constraint.complete or generation.stats.finish_reason == "length"
    # Too many of these, and Hypothesis fails the test.
    assume(generation.stats.finish_reason == "stop")
    assert list(faults(json.loads(text), schema)) == []


def check_call(
    noise: Noise, tool_format: ToolFormat, declared: list[dict[str, Any]], seed: int
) -> None:
    token_id = noise.tokenizer.tokenizer.token_to_id
    start, end = token_id(tool_format.start), token_id(tool_format.end)
    prompt = [*noise.prompt(), start]
    grammar = Grammar.for_tools(noise.tokenizer, declared, tool_format)
    constraint = grammar.constraint(prompt)
    assert grammar.constrains
    assert constraint is not None
    stops = frozenset({end})
    generation = noise.reply(prompt, constraint, sampling=warm(seed), stop_tokens=stops)
    ids = list(generation)
    assert constraint.complete == (generation.stats.finish_reason == "stop")
    assume(constraint.complete)
    text = noise.text([start, *ids, end])
    calls = tool_format.calls(text, declared)
    assert calls is not None, text
    [call] = calls
    functions = {tool["function"]["name"]: tool["function"] for tool in declared}
    schema = functions[call["name"]]["parameters"]
    assert list(faults(call["arguments"], schema)) == [], text


def tool_with(schema: dict[str, Any], required: bool) -> list[dict[str, Any]]:
    parameters = {
        "type": "object",
        "properties": {"x": schema},
        "required": ["x"] * required,
        "additionalProperties": False,
    }
    return [{"type": "function", "function": {"name": "get", "parameters": parameters}}]


seeds = st.integers(0, 2**32)
# Enums of nulls and repeated nulls once lost their values.
NULLS = tool_with({"enum": [None, None]}, required=False)
REQUIRED_NULLS = tool_with({"enum": [None, None]}, required=True)
MIXED_NULLS = tool_with({"enum": [None, "a b", None, "a b"]}, required=True)
NULL_TYPES = tool_with({"type": ["null", "null"]}, required=True)


@settings(max_examples=30, deadline=None)
@given(schema=schemas, seed=seeds)
@example(schema={"enum": [None, None]}, seed=0)
@example(schema={"enum": [None, "a", None]}, seed=0)
def test_finished_replies_are_valid(noise: Noise, schema: dict[str, Any], seed: int) -> None:
    check_reply(noise, schema, seed)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(schema=schemas, seed=seeds)
def test_finished_replies_are_valid_at_length(
    noise: Noise, schema: dict[str, Any], seed: int
) -> None:
    check_reply(noise, schema, seed)


@settings(max_examples=20, deadline=None)
@given(declared=tools(), seed=seeds)
@example(declared=NULLS, seed=0)
@example(declared=NULLS, seed=1)
@example(declared=REQUIRED_NULLS, seed=0)
@example(declared=MIXED_NULLS, seed=0)
@example(declared=NULL_TYPES, seed=0)
def test_the_models_own_parser_reads_calls(
    noise: Noise, declared: list[dict[str, Any]], seed: int
) -> None:
    tool_format = noise.tool_format()
    assert tool_format.name == "qwen3_coder"
    check_call(noise, tool_format, declared, seed)


@settings(max_examples=20, deadline=None)
@given(declared=tools(), seed=seeds)
@example(declared=NULLS, seed=0)
@example(declared=NULLS, seed=1)
@example(declared=REQUIRED_NULLS, seed=0)
@example(declared=MIXED_NULLS, seed=0)
@example(declared=NULL_TYPES, seed=0)
def test_calls_in_json(noise: Noise, declared: list[dict[str, Any]], seed: int) -> None:
    check_call(noise, JSON_CALLS, declared, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(declared=tools(), seed=seeds, json_calls=st.booleans())
def test_calls_at_length(
    noise: Noise, declared: list[dict[str, Any]], seed: int, json_calls: bool
) -> None:
    check_call(noise, JSON_CALLS if json_calls else noise.tool_format(), declared, seed)


@given(seed=seeds)
@settings(max_examples=8)
def test_with_both_a_reply_is_a_value_or_a_call(noise: Noise, seed: int) -> None:
    prompt, tool_format = noise.prompt(), noise.tool_format()
    constraint = Grammar.for_both(noise.tokenizer, UNIT, TOOLS, tool_format).constraint(prompt)
    assert constraint is not None
    assert constraint.holds
    assert not constraint.complete
    end = noise.tokenizer.tokenizer.token_to_id(tool_format.end)
    stops = noise.tokenizer.stop_tokens | {end}
    ids = list(noise.reply(prompt, constraint, sampling=warm(seed), stop_tokens=stops))
    assume(constraint.complete)
    if noise.text(ids).startswith(tool_format.start):
        calls = tool_format.calls(noise.text([*ids, end]), TOOLS)
        assert calls is not None
        assert [call["name"] for call in calls] == ["run_sql"]
        assert list(faults(calls[0]["arguments"], QUERY)) == []
        return
    assert list(faults(json.loads(noise.text(ids)), UNIT)) == []


def test_both_begin_with_either(noise: Noise) -> None:
    start = noise.tokenizer.tokenizer.token_to_id(noise.tool_format().start)
    schema, both = (
        grammar.constraint(noise.prompt())
        for grammar in (
            Grammar.for_schema(noise.tokenizer, UNIT),
            Grammar.for_both(noise.tokenizer, UNIT, TOOLS, noise.tool_format()),
        )
    )
    assert schema is not None
    assert both is not None
    alone, together = schema.mask(), both.mask()
    assert alone is not None
    assert together is not None
    assert np.flatnonzero(alone != together).tolist() == [start]
    assert both.forced() == []
    assert both.accept(start)
    assert not both.complete


class OneByOne:
    """The same constraint with its forced tokens left to the mask."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self.accept, self.mask = constraint.accept, constraint.mask

    finished = property(lambda self: self._constraint.finished)
    complete = property(lambda self: self._constraint.complete)
    holds = property(lambda self: self._constraint.holds)

    def forced(self) -> list[int]:
        return []


def greedy(noise: Noise, constraint: Constraint | None, **changes: Any) -> tuple[list[int], Stats]:
    generation = noise.reply(noise.prompt(), constraint, **changes)
    return list(generation), generation.stats


def person(noise: Noise) -> Constraint:
    constraint = Grammar.for_schema(noise.tokenizer, PERSON).constraint(noise.prompt())
    assert constraint is not None
    return constraint


def test_forced_tokens_are_those_that_the_mask_alone_would_give(noise: Noise) -> None:
    together, stats = greedy(noise, person(noise))
    alone, alone_stats = greedy(noise, OneByOne(person(noise)))
    assert together == alone
    assert 0 < stats.forced_tokens < stats.generated_tokens
    # Each forced token shares a forward pass, and an expert is read once in each.
    assert stats.experts_read < alone_stats.experts_read
    assert alone_stats.forced_tokens == 0


def test_every_token_under_the_mask_is_counted(noise: Noise) -> None:
    tokens, stats = greedy(noise, person(noise))
    assert stats.finish_reason == "stop"
    assert stats.constrained_tokens == stats.generated_tokens == len(tokens)
    assert stats.mask_seconds > 0
    # The model itself gives most of the probability to other tokens.
    assert 0 < stats.allowed_mass < 1


def test_a_reply_may_be_cut_anywhere(noise: Noise) -> None:
    """Also between forced tokens."""
    grammar = Grammar.for_schema(noise.tokenizer, UNIT)
    whole, _ = greedy(noise, grammar.constraint(noise.prompt()))
    for length in range(1, len(whole) + 1):
        constraint = grammar.constraint(noise.prompt())
        assert constraint is not None
        tokens, stats = greedy(noise, constraint, max_tokens=length)
        assert tokens == whole[:length]
        assert constraint.complete == (length == len(whole))
        assert stats.finish_reason == ("stop" if constraint.complete else "length")


@pytest.mark.parametrize("chunk", [1, 3])
def test_more_forced_tokens_than_a_chunk_holds(noise: Noise, chunk: int) -> None:
    schema = {"enum": ["the page cache of the operating system " * 3]}
    constraint = Grammar.for_schema(noise.tokenizer, schema).constraint(noise.prompt())
    tokens, stats = greedy(noise, constraint, chunk=chunk)
    assert json.loads(noise.text(tokens)) == schema["enum"][0]
    assert stats.forced_tokens > chunk


def test_without_a_grammar_nothing_changes(noise: Noise) -> None:
    for sampling in (Sampling(), warm(3), Sampling(repetition_penalty=1.3)):
        changes = {"sampling": sampling, "max_tokens": 20}
        free, stats = greedy(noise, Unconstrained(), **changes)
        assert free == greedy(noise, None, **changes)[0]
        assert (stats.constrained_tokens, stats.forced_tokens, stats.allowed_mass) == (0, 0, 1.0)


def test_penalties_come_before_the_mask(noise: Noise) -> None:
    """They can prefer tokens that the mask allows, but never allow what it forbids."""
    sampling = Sampling(frequency_penalty=-2.0, repetition_penalty=0.2, temperature=1.0, seed=1)
    tokens, _ = greedy(noise, person(noise), sampling=sampling)
    assert list(faults(json.loads(noise.text(tokens)), PERSON)) == []


def test_thoughts_are_free_until_their_budget_is_spent(noise: Noise) -> None:
    prompt = noise.prompt(thinking=True)
    grammar = Grammar.for_schema(noise.tokenizer, PERSON)
    free = list(noise.reply(prompt, None, max_tokens=9))
    constraint = grammar.constraint(prompt, thinking_budget=9)
    assert constraint is not None
    generation = noise.reply(prompt, constraint)
    tokens = list(generation)
    assert tokens[:9] == free
    closing, _, answer = noise.text(tokens[9:]).partition("</think>\n\n")
    assert closing == "\n"
    assert list(faults(json.loads(answer), PERSON)) == []
    assert generation.stats.constrained_tokens == len(tokens) - 9


@pytest.mark.parametrize("chunk", [4, 1000])
def test_every_token_is_computed_in_its_phase(noise: Noise, chunk: int) -> None:
    """The prompt to its end, a free thought, and text under a grammar: precision may depend on
    these. A token is computed when the next one is needed."""
    prompt = noise.prompt(thinking=True)
    constraint = Grammar.for_schema(noise.tokenizer, UNIT).constraint(prompt, thinking_budget=9)
    streamer, events = noise.model.streamer, list[tuple[Phase, int]]()
    streamer.observer = lambda layer, ids: events.append((streamer.phase, len(ids)))
    try:
        tokens = list(noise.reply(prompt, constraint, chunk=chunk))
    finally:
        streamer.observer = None
    counts: dict[Phase, int] = {"prompt": 0, "reply": 0, "grammar": 0}
    for phase, count in events[:: noise.model.plan.layers]:
        counts[phase] += count
    assert counts["prompt"] == len(prompt)
    # The ninth token of the thought goes through the model with the forced tokens after it.
    assert counts["reply"] == 8
    assert 0 < counts["grammar"] < len(tokens) - 8
    order = [phase for phase, _ in events]
    assert order == sorted(order, key=list(counts).index)


def test_a_turn_that_ends_in_its_thought_answers_all_the_same(noise: Noise) -> None:
    prompt = noise.prompt(thinking=True)
    free = list(noise.reply(prompt, None, max_tokens=4))
    # Make the model's fourth token one that ends a turn.
    stops = frozenset({free[3]})
    assert free[3] not in free[:3]
    tokenizer = replace(noise.tokenizer, stop_tokens=stops)
    constraint = Grammar.for_schema(tokenizer, PERSON).constraint(prompt)
    generation = noise.reply(prompt, constraint, stop_tokens=stops)
    thought, _, answer = noise.text(list(generation)).partition("\n</think>\n\n")
    assert thought == noise.text(free[:3])
    assert list(faults(json.loads(answer), PERSON)) == []
    assert generation.stats.finish_reason == "stop"


def test_a_thought_that_never_closes_is_reported(noise: Noise) -> None:
    prompt = noise.prompt(thinking=True)
    constraint = Grammar.for_schema(noise.tokenizer, PERSON).constraint(prompt)
    assert constraint is not None
    generation = noise.reply(prompt, constraint, max_tokens=12)
    assert len(list(generation)) == 12
    assert not constraint.complete
    assert generation.stats.finish_reason == "length"


def test_a_budget_alone(noise: Noise) -> None:
    prompt = noise.prompt(thinking=True)
    constraint = Grammar.free(noise.tokenizer).constraint(prompt, thinking_budget=3)
    tokens = list(noise.reply(prompt, constraint, max_tokens=10))
    assert noise.text(tokens[3:]).startswith("\n</think>\n\n")
    assert len(tokens) == 10


def test_a_call_at_once_after_the_thought(noise: Noise) -> None:
    prompt = noise.prompt(thinking=True)
    grammar = Grammar.for_tools(noise.tokenizer, TOOLS, noise.tool_format())
    constraint = grammar.constraint(prompt, thinking_budget=2, call_at_once=True)
    assert constraint is not None
    end = noise.tokenizer.tokenizer.token_to_id("</tool_call>")
    text = noise.text([*noise.reply(prompt, constraint, stop_tokens=frozenset({end})), end])
    assert text.partition("</think>\n\n")[2].startswith("<tool_call>\n<function=run_sql>\n")
    assert noise.tool_format().calls(text, TOOLS) is not None
