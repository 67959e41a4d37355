"""Noise held to a grammar: whatever a model of random weights says to its end is what was asked.

At temperature 1 it tries everything that the mask leaves it. `make test ARGS='-m slow'` runs the
long versions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.chat.tool_calls import ToolFormat, tool_format
from flash_moe.decode.loop import Generation
from flash_moe.decode.sampling import Sampling
from flash_moe.decode.statistics import Stats
from flash_moe.evaluation.json_schema import check_schema, faults
from flash_moe.grammar.constraints import Constraint, Free
from flash_moe.grammar.grammar import Grammar
from flash_moe.model.load import Settings, load
from flash_moe.synth.model import Shape, synthesize
from tests.grammar.schemas import schemas, tools

# Noise comes to its end in a tenth of this, or, in a key or a number of its own, perhaps never.
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
        synthesize(folder, Shape(layers=4, experts=8, hidden=128, intermediate=64, vocabulary=1100))
        self.folder = folder
        self.model = load(folder, Settings(bank_bytes=1))
        self.tokenizer = load_tokenizer(folder)

    def prompt(self, *, thinking: bool = False) -> list[int]:
        messages = [{"role": "user", "content": "?"}]
        return self.tokenizer.encode_chat(messages, enable_thinking=thinking)

    def reply(self, prompt: list[int], constraint: Constraint | None, **changes: Any) -> Generation:
        given: dict[str, Any] = {"max_tokens": ENOUGH, "stop_tokens": self.tokenizer.stop_tokens}
        return Generation(self.model, prompt, constraint=constraint, **{**given, **changes})

    def text(self, ids: list[int]) -> str:
        """With the tokens that mark thoughts and calls."""
        text: str = self.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def form(self) -> ToolFormat:
        found = tool_format(self.folder, self.tokenizer)
        assert found is not None
        return found


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


def check_call(noise: Noise, form: ToolFormat, declared: list[dict[str, Any]], seed: int) -> None:
    start, end = (noise.tokenizer.tokenizer.token_to_id(text) for text in (form.start, form.end))
    prompt = [*noise.prompt(), start]
    grammar = Grammar.for_tools(noise.tokenizer, declared, form)
    constraint = grammar.constraint(prompt)
    assert grammar.constrains
    assert constraint is not None
    stops = frozenset({end})
    generation = noise.reply(prompt, constraint, sampling=warm(seed), stop_tokens=stops)
    ids = list(generation)
    assert constraint.complete == (generation.stats.finish_reason == "stop")
    assume(constraint.complete)
    text = noise.text([start, *ids, end])
    calls = form.calls(text, declared)
    assert calls is not None, text
    [call] = calls
    functions = {tool["function"]["name"]: tool["function"] for tool in declared}
    schema = functions[call["name"]]["parameters"]
    assert list(faults(call["arguments"], schema)) == [], text


seeds = st.integers(0, 2**32)


@settings(max_examples=30, deadline=None)
@given(schema=schemas, seed=seeds)
def test_what_is_finished_fits_its_schema(noise: Noise, schema: dict[str, Any], seed: int) -> None:
    check_reply(noise, schema, seed)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(schema=schemas, seed=seeds)
def test_what_is_finished_fits_its_schema_at_length(
    noise: Noise, schema: dict[str, Any], seed: int
) -> None:
    check_reply(noise, schema, seed)


@settings(max_examples=20, deadline=None)
@given(declared=tools(), seed=seeds)
def test_calls_are_what_the_models_own_parser_takes(
    noise: Noise, declared: list[dict[str, Any]], seed: int
) -> None:
    form = noise.form()
    assert form.name == "qwen3_coder"
    check_call(noise, form, declared, seed)


@settings(max_examples=20, deadline=None)
@given(declared=tools(), seed=seeds)
def test_calls_in_json(noise: Noise, declared: list[dict[str, Any]], seed: int) -> None:
    check_call(noise, JSON_CALLS, declared, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(declared=tools(), seed=seeds, json_calls=st.booleans())
def test_calls_at_length(
    noise: Noise, declared: list[dict[str, Any]], seed: int, json_calls: bool
) -> None:
    check_call(noise, JSON_CALLS if json_calls else noise.form(), declared, seed)


@given(seed=seeds)
@settings(max_examples=8)
def test_with_both_a_reply_is_a_value_or_a_call(noise: Noise, seed: int) -> None:
    prompt, form = noise.prompt(), noise.form()
    constraint = Grammar.for_both(noise.tokenizer, UNIT, TOOLS, form).constraint(prompt)
    assert constraint is not None
    assert constraint.holds
    assert not constraint.complete
    end = noise.tokenizer.tokenizer.token_to_id(form.end)
    stops = noise.tokenizer.stop_tokens | {end}
    ids = list(noise.reply(prompt, constraint, sampling=warm(seed), stop_tokens=stops))
    assume(constraint.complete)
    if noise.text(ids).startswith(form.start):
        calls = form.calls(noise.text([*ids, end]), TOOLS)
        assert calls is not None
        assert [call["name"] for call in calls] == ["run_sql"]
        assert list(faults(calls[0]["arguments"], QUERY)) == []
        return
    assert list(faults(json.loads(noise.text(ids)), UNIT)) == []


def test_both_begin_with_either(noise: Noise) -> None:
    start = noise.tokenizer.tokenizer.token_to_id(noise.form().start)
    schema, both = (
        grammar.constraint(noise.prompt())
        for grammar in (
            Grammar.for_schema(noise.tokenizer, UNIT),
            Grammar.for_both(noise.tokenizer, UNIT, TOOLS, noise.form()),
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
    # Noise would rather say something else.
    assert 0 < stats.allowed_mass < 1


def test_a_reply_may_be_cut_anywhere(noise: Noise) -> None:
    """In the middle of forced tokens, too."""
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
        free, stats = greedy(noise, Free(), **changes)
        assert free == greedy(noise, None, **changes)[0]
        assert (stats.constrained_tokens, stats.forced_tokens, stats.allowed_mass) == (0, 0, 1.0)


def test_penalties_come_before_the_mask(noise: Noise) -> None:
    """They can push what the mask allows, and never lift what it forbids."""
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
def test_what_is_computed_is_known(noise: Noise, chunk: int) -> None:
    """A prompt to its end, a free thought, and what a grammar holds: some choices of experts depend
    on it. A token is computed when the one after it is wanted."""
    prompt = noise.prompt(thinking=True)
    constraint = Grammar.for_schema(noise.tokenizer, UNIT).constraint(prompt, thinking_budget=9)
    streamer, seen = noise.model.streamer, list[tuple[str, int]]()
    streamer.watch = lambda layer, chosen: seen.append((streamer.occasion, len(chosen)))
    try:
        tokens = list(noise.reply(prompt, constraint, chunk=chunk))
    finally:
        streamer.watch = None
    counts = {"prompt": 0, "reply": 0, "grammar": 0}
    for occasion, count in seen[:: noise.model.plan.layers]:
        counts[occasion] += count
    assert counts["prompt"] == len(prompt)
    # The ninth thought opens what is forced, and goes through the model with it.
    assert counts["reply"] == 8
    assert 0 < counts["grammar"] < len(tokens) - 8
    order = [occasion for occasion, _ in seen]
    assert order == sorted(order, key=list(counts).index)


def test_a_turn_that_ends_in_its_thought_answers_all_the_same(noise: Noise) -> None:
    prompt = noise.prompt(thinking=True)
    free = list(noise.reply(prompt, None, max_tokens=4))
    # What the model says fourth, made the end of a turn.
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
    grammar = Grammar.for_tools(noise.tokenizer, TOOLS, noise.form())
    constraint = grammar.constraint(prompt, thinking_budget=2, call_at_once=True)
    assert constraint is not None
    end = noise.tokenizer.tokenizer.token_to_id("</tool_call>")
    text = noise.text([*noise.reply(prompt, constraint, stop_tokens=frozenset({end})), end])
    assert text.partition("</think>\n\n")[2].startswith("<tool_call>\n<function=run_sql>\n")
    assert noise.form().calls(text, TOOLS) is not None
