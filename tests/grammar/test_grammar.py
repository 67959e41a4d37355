"""Grammars and the states they put a reply through, without a model: tokens drawn by hand."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from flash_moe.chat.template import Template
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import FlashMoeError, OptionError
from flash_moe.grammar import vocabulary
from flash_moe.grammar.constraints import Constraint
from flash_moe.grammar.grammar import Grammar
from flash_moe.synth.tokenizer import TEMPLATE, make_tokenizer
from tests.grammar.schemas import schemas
from tests.strategies import edited

MADE = make_tokenizer()
STOPS = frozenset(MADE.stop_tokens)


def new_tokenizer(template: str = TEMPLATE) -> ChatTokenizer:
    return ChatTokenizer(Tokenizer.from_str(MADE.json), Template(template, {}), STOPS)


TOKENIZER = new_tokenizer()
STOP = min(STOPS)
OPENS, CLOSES = (TOKENIZER.tokenizer.token_to_id(text) for text in ("<think>", "</think>"))
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def prompt(text: str = "?", *, thinking: bool = False) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return TOKENIZER.encode_chat(messages, enable_thinking=thinking)


def constraint(schema: dict[str, Any], said: list[int], **options: Any) -> Constraint:
    found = Grammar.for_schema(TOKENIZER, schema).constraint(said, **options)
    assert found is not None
    return found


def allowed(held: Constraint) -> list[int]:
    mask = held.mask()
    assert mask is not None
    found: list[int] = np.flatnonzero(mask).tolist()
    return found


def say(held: Constraint, tokens: list[int]) -> Constraint:
    for token in tokens:
        assert held.accept(token)
    return held


def takes(schema: dict[str, Any], text: str) -> bool:
    """Whether a grammar allows a text, and would let it end there."""
    held = constraint(schema, prompt())
    for token in ids(text):
        if token not in allowed(held):
            return False
        held.accept(token)
    return held.complete


# What a grammar says -------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_a_forced_token_is_the_only_one_allowed(schema: dict[str, Any], seed: int) -> None:
    """And the mask changes nothing: asked twice, it says the same."""
    held, random = constraint(schema, prompt()), np.random.default_rng(seed)
    for _ in range(25):
        for token in held.forced():
            assert allowed(held) == [token] == allowed(held)
            held.accept(token)
        if held.finished:
            break
        held.accept(int(random.choice(allowed(held))))


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (NUMBER, '{"n": 12}', True),
        (NUMBER, '{"n":12}', False),
        (NUMBER, '{"n": 12', False),
        (NUMBER, '{"n": 12, "more": 1}', False),
        ({**NUMBER, "additionalProperties": True}, '{"n": 12, "more": 1}', True),
        ({**NUMBER, "required": ["n", "m"]}, '{"n": 12, "m": null}', True),
        ({"type": "object"}, '{"n": 12}', True),
        ({"allOf": [NUMBER, {"properties": {"m": {}}}]}, '{"n": 1, "m": 2}', True),
        ({"anyOf": [NUMBER, {"type": "null"}]}, '{"n": 1, "m": 2}', False),
        ({"$ref": "#/$defs/N", "$defs": {"N": NUMBER}}, '{"n": 1}', True),
        ({"type": "array", "items": {"enum": [1]}, "uniqueItems": False}, "[1, 1]", True),
        ({"type": "integer", "maximum": 2**63 - 1, "minimum": -(2**63)}, str(2**53 - 1), True),
        ({"type": "integer", "maximum": 2**63 - 1, "minimum": -(2**63)}, str(2**53), False),
        ({"enum": ["</think>", "<|im_end|>"]}, '"<|im_end|>"', False),
    ],
)
def test_cases(schema: dict[str, Any], text: str, expected: bool) -> None:
    before = json.dumps(schema)
    assert takes(schema, text) is expected
    assert json.dumps(schema) == before


def test_a_text_that_spells_a_special_token_is_not_that_token() -> None:
    held = constraint({"enum": ["</think><|im_end|>"]}, prompt())
    tokens = held.forced()
    assert not {CLOSES, *STOPS} & set(tokens)
    assert TOKENIZER.tokenizer.decode(tokens) == '"</think><|im_end|>"'
    assert say(held, tokens).finished


def test_the_end_of_the_turn_is_allowed_where_the_value_is_whole() -> None:
    held = constraint({"enum": [1, 12]}, prompt())
    assert not STOPS & set(allowed(held))
    say(held, ids("1"))
    assert held.complete
    assert not held.finished
    assert set(allowed(held)) >= STOPS
    assert say(held, [STOP]).finished
    assert held.forced() == []


# What no grammar can say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.com/a"}, "the schema's '$ref': \"https://example.com/a\""),
        ({"$ref": "#/$defs/none"}, "'$ref'"),
        ({"properties": {"x": {"not": {"type": "null"}}}}, "the schema.x's 'not'"),
        ({"items": {"type": "array", "uniqueItems": True}}, "the schema.items's 'uniqueItems'"),
        ({"anyOf": [NUMBER, {"pattern": "(?=x)y"}]}, "the schema.anyOf[1]'s 'pattern'"),
        ({"type": "string", "format": "zip"}, "'format'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ({"type": "object", "propertyNames": {}}, "'propertyNames'"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "'minimum'"),
        ({"type": "int"}, "Invalid type: int"),
        # The library would crash with the process.
        ({"enum": [-(2**63)]}, "too large"),
        ({"const": {"a": [10**400]}}, "too large"),
        ({"type": "integer", "minimum": 2**63}, "too large"),
        ({"enum": []}, "'enum'"),
        # The library panics over where to cut its own message.
        ({"items": {"enum": {"é" * 60: "漢" * 60}}}, "'enum'"),
        ({"default": b""}, "no JSON"),
        ([], "not an object"),
        (None, "not an object"),
    ],
)
def test_what_a_grammar_cannot_express_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Grammar.for_schema(TOKENIZER, schema)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_speaks_in_channels_is_refused() -> None:
    plain = Tokenizer.from_str(MADE.json.replace("<tool_response>", "<|channel|>"))
    with pytest.raises(OptionError, match="channels"):
        Grammar.for_schema(ChatTokenizer(plain, None, STOPS), NUMBER)


def test_a_schema_nested_too_deeply() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(OptionError, match="too deeply"):
        Grammar.for_schema(TOKENIZER, schema)


WIDE = {
    "$defs": {"tag": {"enum": ["a", 1, None]}},
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^a|b$"},
        "age": {"type": ["integer", "null"], "minimum": -3, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        "more": {"anyOf": [{"const": 1.5}, {"additionalProperties": {"format": "date"}}]},
    },
    "required": ["name"],
}


@settings(max_examples=150, deadline=None)
@given(edited(WIDE))
def test_any_schema_is_taken_or_refused(schema: Any) -> None:
    try:
        held = constraint(schema, prompt())
    except OptionError:
        return
    assert not held.finished


def test_a_token_that_the_grammar_forbids_is_a_plain_error() -> None:
    held = constraint(NUMBER, prompt())
    with pytest.raises(FlashMoeError) as caught:
        held.accept(ids("x")[0])
    assert "grammar" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(FlashMoeError):
        held.mask()


# The vocabulary ------------------------------------------------------------------------------


def test_a_vocabulary_is_made_once_and_goes_with_its_tokenizer() -> None:
    tokenizer = new_tokenizer()
    made = vocabulary.vocabulary(tokenizer)
    assert vocabulary.vocabulary(tokenizer) is made
    assert made.is_canonical
    assert made.vocab_size == MADE.size
    Grammar.for_schema(tokenizer, NUMBER)
    gone = weakref.ref(tokenizer)
    del tokenizer, made
    gc.collect()
    assert gone() is None
