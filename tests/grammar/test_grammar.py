"""Grammars and the states that they put a reply through, without a model."""

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

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import FlashMoeError, OptionError
from flash_moe.grammar import vocabulary
from flash_moe.grammar.grammar import Grammar
from tests.grammar.schemas import schemas
from tests.grammar.stepping import (
    CLOSES,
    STOP,
    STOPS,
    SYNTHETIC,
    TOKENIZER,
    accept,
    allowed,
    ids,
    new_tokenizer,
    schema_constraint,
    takes,
)
from tests.strategies import edited

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


# What a grammar allows ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_a_forced_token_is_the_only_one_allowed(schema: dict[str, Any], seed: int) -> None:
    """And asking for the mask changes nothing."""
    constraint, random = schema_constraint(schema), np.random.default_rng(seed)
    for _ in range(25):
        for token in constraint.forced():
            assert allowed(constraint) == [token] == allowed(constraint)
            constraint.accept(token)
        if constraint.finished:
            break
        constraint.accept(int(random.choice(allowed(constraint))))


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
    assert takes(schema_constraint(schema), text) is expected
    assert json.dumps(schema) == before


def test_a_text_that_spells_a_special_token_is_not_that_token() -> None:
    constraint = schema_constraint({"enum": ["</think><|im_end|>"]})
    tokens = constraint.forced()
    assert not {CLOSES, *STOPS} & set(tokens)
    assert TOKENIZER.tokenizer.decode(tokens) == '"</think><|im_end|>"'
    assert accept(constraint, tokens).finished


def test_the_end_of_the_turn_is_allowed_when_the_value_is_whole() -> None:
    constraint = schema_constraint({"enum": [1, 12]})
    assert not STOPS & set(allowed(constraint))
    accept(constraint, ids("1"))
    assert constraint.complete
    assert not constraint.finished
    assert set(allowed(constraint)) >= STOPS
    assert accept(constraint, [STOP]).finished
    assert constraint.forced() == []


# What no grammar can express ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.com/a"}, "'$ref': \"https://example.com/a\" in the schema ("),
        ({"$ref": "#/$defs/none"}, "'$ref'"),
        (
            {"properties": {"x": {"not": {"type": "null"}}}},
            '\'not\': {"type": "null"} in the schema.x (',
        ),
        (
            {"items": {"type": "array", "uniqueItems": True}},
            "'uniqueItems': true in the schema.items (",
        ),
        (
            {"anyOf": [NUMBER, {"pattern": "(?=x)y"}]},
            "'pattern': \"(?=x)y\" in the schema.anyOf[1] (",
        ),
        ({"type": "string", "format": "zip"}, "'format'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ({"type": "object", "propertyNames": {}}, "'propertyNames'"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "'minimum'"),
        ({"type": "int"}, "Invalid type: int"),
        # llguidance would crash the process.
        ({"enum": [-(2**63)]}, "too large"),
        ({"const": {"a": [10**400]}}, "too large"),
        # llguidance would write the even number beside it.
        ({"enum": [1, 2**53 + 1]}, "9007199254740993 in the schema: it is too large"),
        ({"type": "integer", "minimum": 2**63}, "too large"),
        ({"enum": []}, "'enum'"),
        # llguidance panics where it cuts its own message.
        ({"items": {"enum": {"é" * 60: "漢" * 60}}}, "'enum'"),
        ({"default": b""}, "not JSON"),
        ([], "[] is not an object"),
        (None, "not an object"),
    ],
)
def test_what_a_grammar_cannot_express_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Grammar.for_schema(TOKENIZER, schema)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_replies_in_channels_is_refused() -> None:
    plain = Tokenizer.from_str(SYNTHETIC.json.replace("<tool_response>", "<|channel|>"))
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
def test_any_schema_is_accepted_or_refused(schema: Any) -> None:
    try:
        constraint = schema_constraint(schema)
    except OptionError:
        return
    assert not constraint.finished


def test_a_token_that_the_grammar_forbids_is_a_plain_error() -> None:
    constraint = schema_constraint(NUMBER)
    with pytest.raises(FlashMoeError) as caught:
        constraint.accept(ids("x")[0])
    assert "grammar" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(FlashMoeError):
        constraint.mask()


# The vocabulary ------------------------------------------------------------------------------


def test_a_vocabulary_is_built_once_and_goes_with_its_tokenizer() -> None:
    tokenizer = new_tokenizer()
    first = vocabulary.vocabulary(tokenizer)
    assert vocabulary.vocabulary(tokenizer) is first
    assert first.is_canonical
    assert first.vocab_size == SYNTHETIC.size
    Grammar.for_schema(tokenizer, NUMBER)
    reference = weakref.ref(tokenizer)
    del tokenizer, first
    gc.collect()
    assert reference() is None
