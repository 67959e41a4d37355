"""Null, repeated values, lists of types: grammars allow the values that JSON Schema does.

In calls of tags, a parameter's value is bare text or JSON depending on its schema, and null is a
word like any other, so these schemas are taken apart and put together again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flash_moe.decode.constraint import Constraint
from flash_moe.errors import OptionError
from flash_moe.grammar.grammar import Grammar
from tests.grammar.stepping import TOKENIZER, prompt, takes
from tests.grammar.test_tools import JSON, TAGS, call, tool

Schema = dict[str, Any]

VALUES: list[Any] = [None, True, False, 0, 7, 2.5, "a", "bc", "7", "null", "true", [], {}]
WRITINGS = sorted(
    {json.dumps(v) for v in VALUES} | {v for v in VALUES if type(v) is str} | {"True"}
)
TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
}


def allows(schema: Any, value: Any, definitions: Schema) -> bool:
    """JSON Schema read plainly: every keyword is a condition of its own."""
    if isinstance(schema, bool):
        return schema

    def fits(option: Any) -> bool:
        return allows(option, value, definitions)

    conditions: dict[str, Callable[[Any], bool]] = {
        "type": lambda types: any(
            TYPES[name](value) for name in ([types] if isinstance(types, str) else types)
        ),
        "enum": lambda choices: json.dumps(value) in map(json.dumps, choices),
        "const": lambda choice: json.dumps(value) == json.dumps(choice),
        "anyOf": lambda options: any(map(fits, options)),
        "oneOf": lambda options: sum(map(fits, options)) == 1,
        "minLength": lambda least: not isinstance(value, str) or len(value) >= least,
        "minimum": lambda least: not TYPES["number"](value) or value >= least,
        "$ref": lambda reference: fits(definitions[reference.removeprefix("#/$defs/")]),
    }
    return all(conditions[key](schema[key]) for key in schema.keys() & conditions.keys())


# Small pools, so that values and types repeat and meet each other.
names = st.sampled_from([*TYPES, "null", "string"])
choices = st.sampled_from([*VALUES, None, None, "a"])
keywords = {
    "type": names | st.lists(names, min_size=1, max_size=3),
    "enum": st.lists(choices, min_size=1, max_size=4),
    "const": choices,
    "minLength": st.integers(0, 2),
    "minimum": st.integers(0, 8),
    "default": st.none(),
}
plain = st.sampled_from([{"type": "null"}, {"type": "string"}, {"type": ["string", "null"]}])
leaves = plain | st.fixed_dictionaries({}, optional=keywords).filter(lambda schema: len(schema) < 4)
references = st.sampled_from(["one", "other"]).map(lambda name: {"$ref": f"#/$defs/{name}"})


def combined(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def combine(keyword: str, options: list[Schema], outer: Schema) -> Schema:
        return {keyword: options, **outer}

    options = st.lists(inner | references, min_size=1, max_size=3)
    outer = st.just({}) | leaves
    return st.builds(combine, st.sampled_from(["anyOf", "oneOf"]), options, outer) | st.builds(
        lambda reference, outer: {**reference, **outer}, references, outer
    )


schemas = st.recursive(leaves, combined, max_leaves=4)
definition_tables = st.fixed_dictionaries({"one": leaves, "other": leaves})
NONE: Schema = {"one": {}, "other": {"type": "null"}}
# Only null, in every way to say so; null beside texts; and null forbidden by another keyword.
CASES: list[Any] = [
    {"enum": [None]},
    {"enum": [None, None]},
    {"enum": ["a", None, None]},
    {"enum": ["a", "a", None, "a"]},
    {"enum": [7, None, 7, None]},
    {"enum": ["null", None]},
    {"const": None},
    {"const": None, "type": ["null"]},
    {"type": ["null"]},
    {"type": ["null", "null"]},
    {"type": ["string", "null", "null"]},
    {"type": ["integer", "integer"]},
    {"anyOf": [{"type": "null"}, {"type": "null"}]},
    {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "null"}]},
    {"anyOf": [{"enum": [None, None]}, {"type": "null"}]},
    {"anyOf": [{"enum": ["a", None]}, {"const": None}]},
    {"anyOf": [{"$ref": "#/$defs/other"}, {"type": "integer"}]},
    {"anyOf": [{"type": "string"}, {"type": "null"}], "type": "string"},
    {"anyOf": [{"type": "string"}, {"type": "null"}], "enum": ["a", 7]},
    {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}], "minimum": 1},
    {"oneOf": [{"type": "string"}, {"type": "null"}]},
    {"oneOf": [{"type": "string"}, {"type": "null"}, {"type": "null"}]},
    {"oneOf": [{"type": ["string", "null"]}, {"type": "null"}]},
    {"type": "string", "enum": ["a", None]},
    {"type": ["string", "null"], "enum": ["a", "bc"]},
    {"type": ["string", "null"], "const": "a"},
    {"type": "string", "enum": ["a", "bc"], "minLength": 2},
    {"type": "string", "enum": [None, None]},
    {"$ref": "#/$defs/other", "type": ["string", "null"]},
    False,
    True,
]


def declared(schema: Any, definitions: Schema, required: bool) -> list[dict[str, Any]]:
    return [tool("f", {"x": schema}, required=["x"] * required, **{"$defs": definitions})]


def refused(schema: Any, definitions: Schema, error: OptionError, sayable: list[Any]) -> bool:
    """Schemas that allow nothing are refused, and two kinds that llguidance does not support:
    oneOf with options that it cannot tell apart, and references that allow nothing."""
    limits = [keyword in json.dumps(schema) for keyword in ("oneOf", "$ref")]
    assert any(limits) or not any(allows(schema, v, definitions) for v in sayable), str(error)
    return True


def check_tags(schema: Any, definitions: Schema, required: bool) -> bool:
    """Whether there is a grammar; if there is, it must be right."""
    tools = declared(schema, definitions, required)
    # The parser reads the bare word as null.
    sayable = [value for value in VALUES if value != "null"]
    try:
        grammar = Grammar.for_tools(TOKENIZER, tools, TAGS)
    except OptionError as error:
        return not refused(schema, definitions, error, sayable)
    parsed = set()
    for writing in WRITINGS:
        text = call("f", x=writing)
        if takes(tool_constraint(grammar), text):
            [result] = TAGS.calls(text, tools) or []
            assert allows(schema, result["arguments"]["x"], definitions), writing
            parsed.add(json.dumps(result["arguments"]["x"]))
    assert {json.dumps(v) for v in sayable if allows(schema, v, definitions)} <= parsed
    assert takes(tool_constraint(grammar), call("f")) is not required
    return True


def check_json(schema: Any, definitions: Schema) -> bool:
    tools = declared(schema, definitions, True)
    try:
        grammar = Grammar.for_tools(TOKENIZER, tools, JSON)
    except OptionError as error:
        return not refused(schema, definitions, error, VALUES)
    for value in VALUES:
        arguments = json.dumps({"x": value})
        text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
        valid = allows(schema, value, definitions)
        assert takes(tool_constraint(grammar), text) is valid, value
    return True


def tool_constraint(grammar: Grammar) -> Constraint:
    constraint = grammar.constraint(prompt())
    assert constraint is not None
    return constraint


@pytest.mark.parametrize("schema", CASES, ids=json.dumps)
@pytest.mark.parametrize("required", [True, False])
def test_cases_in_tags(schema: Any, required: bool) -> None:
    satisfiable = any(allows(schema, value, NONE) for value in VALUES)
    assert check_tags(schema, NONE, required) is satisfiable


@pytest.mark.parametrize("schema", CASES, ids=json.dumps)
def test_cases_in_json(schema: Any) -> None:
    satisfiable = any(allows(schema, value, NONE) for value in VALUES)
    assert check_json(schema, NONE) is satisfiable or "oneOf" in schema


@settings(max_examples=100)
@given(schemas, definition_tables, st.booleans())
@example({"enum": [None, None]}, NONE, False)
@example({"enum": ["a", None, None]}, NONE, False)
@example({"type": ["null", "null"]}, NONE, False)
@example({"anyOf": [{"type": "null"}, {"type": "null"}]}, NONE, True)
@example({"const": None}, NONE, True)
def test_values_in_tags(schema: Schema, definitions: Schema, required: bool) -> None:
    check_tags(schema, definitions, required)


@settings(max_examples=100)
@given(schemas, definition_tables)
@example({"enum": [None, None]}, NONE)
@example({"type": ["null", "null"]}, NONE)
def test_values_in_json(schema: Schema, definitions: Schema) -> None:
    check_json(schema, definitions)
