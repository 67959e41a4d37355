"""Tool calls, character by character: what a grammar allows, and how the parser reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mlx_lm.tool_parsers import glm47, json_tools, qwen3_coder

from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.chat.tool_parameters import plain_tools
from flash_moe.decode.constraint import Constraint
from flash_moe.errors import OptionError
from flash_moe.grammar.grammar import Grammar
from tests.grammar.stepping import (
    CLOSES,
    OPENS,
    STOPS,
    TOKENIZER,
    accept,
    allowed,
    ids,
    prompt,
    takes,
)


def format_of(name: str, module: Any) -> ToolFormat:
    return ToolFormat(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call)


TAGS = format_of("qwen3_coder", qwen3_coder)
JSON = format_of("json_tools", json_tools)
[START], [END] = ids("<tool_call>"), ids("</tool_call>")


def tool(name: str, properties: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """In the form of llm and of OpenAI's interface; `more` has keywords such as `required`."""
    parameters = {"type": "object", "properties": properties or {}, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def tool_constraint(
    declared: list[dict[str, Any]], tool_format: ToolFormat = TAGS, **options: Any
) -> Constraint:
    grammar = Grammar.for_tools(TOKENIZER, declared, tool_format)
    constraint = grammar.constraint(prompt(), **options)
    assert constraint is not None
    return constraint


def call(name: str, **arguments: str) -> str:
    written = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{written}</function>\n</tool_call>"


WEATHER = tool(
    "weather",
    {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
    },
    required=["city", "days"],
)
NOW = tool("now")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Text without a call.", True),
        (f"Let me look. {call('weather', city='Köln', days='3')}", True),
        (call("weather", city="two\nlines\n", days="14", unit="F"), True),
        (call("now") + "\n" + call("now") + " and text", True),
        (call("now")[:-1], False),
        ("<tool_call>", False),
        (call("weather", city="x", days="15"), False),
        (call("weather", city="x", days="3", unit="K"), False),
        (call("weather", city="x"), False),
        (call("weather", days="3", city="x"), False),
        (call("weather", city="x", days="3", more="1"), False),
        (call("weather", city="null", days="3"), False),
        (call("weather", city="</tool_call>", days="3"), False),
        (call("weather", city="a</parameter>b", days="3"), False),
        (call("weather", city="a < b </p>", days="3"), True),
        (call("later"), False),
        (call("now", city="x"), False),
    ],
)
def test_calls_in_tags(text: str, expected: bool) -> None:
    assert takes(tool_constraint([WEATHER, NOW]), text) is expected
    if expected and "<tool_call>" in text:
        assert TAGS.calls(text, [WEATHER, NOW]) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "now", "arguments": {}}', True),
        ('\n{"name": "weather", "arguments": {"city": "x", "days": 3}}\n', True),
        ('{"name": "now", "arguments": {"city": "x"}}', False),
        ('{"name": "weather", "arguments": {"city": "x"}}', False),
        ('{"name": "weather", "arguments": {"city": "x", "days": 3, "more": 1}}', False),
        ('{"name": "later", "arguments": {}}', False),
    ],
)
def test_calls_in_json(text: str, expected: bool) -> None:
    whole = f"So: <tool_call>{text}</tool_call>"
    assert takes(tool_constraint([WEATHER, NOW], JSON), whole) is expected
    if expected:
        assert JSON.calls(whole, [WEATHER, NOW]) is not None


OPTIONAL = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
SIDE = {"type": "object", "properties": {"width": {"type": "number"}}, "required": ["width"]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "", ""),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "integer"}, "-12", -12),
        ({"type": "number"}, "1.5e3", 1500),
        ({"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
        (OPTIONAL, "5", 5),
        (OPTIONAL, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": ["string", "null"]}, "null", None),
        ({"enum": ["a", None]}, "a", "a"),
        ({"enum": ["a", 1]}, '"a"', "a"),
        ({"enum": ["a", 1]}, "1", 1),
        ({"const": "a b"}, "a b", "a b"),
        ({"type": ["integer", "boolean"]}, "true", True),
        ({"$ref": "#/$defs/side"}, '{"width": 2}', {"width": 2}),
        ({"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}]}, "C", "C"),
        ({"type": "array", "items": {"$ref": "#/$defs/unit"}}, '["C"]', ["C"]),
        ({}, '"x"', "x"),
        ({}, '{"a": [null]}', {"a": [None]}),
    ],
)
def test_values_come_back_as_declared(schema: dict[str, Any], text: str, value: Any) -> None:
    """With types that the parser would take for something else by itself."""
    definitions = {"side": SIDE, "unit": {"type": "string", "enum": ["C", "F"]}}
    declared = [tool("f", {"x": schema}, required=["x"], **{"$defs": definitions})]
    written = call("f", x=text)
    assert takes(tool_constraint(declared), written)
    assert TAGS.calls(written, declared) == [{"name": "f", "arguments": {"x": value}}]


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        ({"maxLength": 3}, "a\nb", "four"),
        ({"minLength": 3}, "a\nb", "ab"),
        ({"pattern": "^[a-z]+$"}, "abc", "ab1"),
        ({"pattern": "^a"}, "ab\nc", "ba"),
        ({"pattern": "a/b$"}, "x a/b", "a/bc"),
        ({"pattern": "^a|b$"}, "a", "c"),
        ({"pattern": "\\$"}, "1 $ 2", "1"),
        ({"pattern": "b", "maxLength": 3}, "abc", "abcd"),
        ({"format": "email"}, "not checked", "null"),
    ],
)
def test_bare_text(schema: dict[str, Any], yes: str, no: str) -> None:
    declared = [tool("f", {"x": {"type": "string", **schema}})]
    assert takes(tool_constraint(declared), call("f", x=yes))
    assert not takes(tool_constraint(declared), call("f", x=no))


def test_names_that_begin_alike() -> None:
    declared = [tool("get"), tool("get_all", {"a": {}, "a b-c".replace(" ", "_"): {}})]
    assert takes(tool_constraint(declared), call("get"))
    assert takes(tool_constraint(declared), call("get_all", a="1"))
    assert not takes(tool_constraint(declared), call("get_"))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([], "tools is empty"),
        ([{"type": "function", "function": {"parameters": {}}}], "has no name"),
        ([tool("two words")], "'two words'"),
        ([tool("f", {"a>b": {"type": "string"}})], "'a>b'"),
        ([tool("f", required=["x"])], "requires 'x'"),
        ([tool("f", {"x": {"type": "string", "pattern": "(?=a)"}})], "'pattern'"),
        ([tool("f", {"x": {"type": "array", "uniqueItems": True}})], "'uniqueItems'"),
        ([tool("f", {"x": {"enum": ["null"]}})], "'x' of the tool 'f'"),
        ([tool("f", {"x": {"enum": ["</parameter>"]}})], "'x' of the tool 'f'"),
    ],
)
def test_tools_that_cannot_be_called(declared: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Grammar.for_tools(TOKENIZER, declared, TAGS)
    assert message in str(caught.value)


def test_formats_without_a_grammar_constrain_nothing() -> None:
    unknown = format_of("glm47", glm47)
    elsewhere = ToolFormat("qwen3_coder", "<no token>", "</tool_call>", TAGS.parse)
    for tool_format in (unknown, elsewhere, None):
        grammar = Grammar.for_tools(TOKENIZER, [NOW], tool_format)
        assert not grammar.constrains
        assert grammar.constraint(prompt()) is None
    assert Grammar.for_tools(TOKENIZER, [NOW], TAGS).constrains


def test_nothing_is_masked_outside_calls() -> None:
    constraint = tool_constraint([NOW])
    for _ in range(2):
        assert (constraint.mask(), constraint.forced(), constraint.complete) == (None, [], True)
        accept(constraint, [*ids("Well."), START])
        assert not constraint.complete
        # One tool without parameters leaves nothing to choose.
        while tokens := constraint.forced():
            accept(constraint, tokens)
    assert not constraint.finished
    accept(constraint, [min(STOPS)])


def test_a_call_in_a_thought_is_a_thought() -> None:
    constraint = Grammar.for_tools(TOKENIZER, [NOW], TAGS).constraint(prompt(thinking=True))
    assert constraint is not None
    accept(constraint, [START, *ids("anything")])
    assert constraint.mask() is None
    accept(constraint, [CLOSES, START])
    assert allowed(constraint) == ids("\n")


def test_a_model_may_think_again_before_it_calls() -> None:
    constraint = tool_constraint([NOW], thinking_budget=2)
    accept(constraint, [OPENS, *ids("a"), *ids("b")])
    assert constraint.forced() == ids("\n</think>\n\n")


def test_a_call_at_once() -> None:
    constraint = tool_constraint([NOW], call_at_once=True)
    assert not constraint.complete
    assert constraint.forced() == [START]
    written: list[int] = []
    while tokens := constraint.forced():
        written += tokens
        accept(constraint, tokens)
    assert written[-1] == END
    assert TAGS.calls(TOKENIZER.tokenizer.decode(written), [NOW]) == [
        {"name": "now", "arguments": {}}
    ]
    assert constraint.complete


@pytest.mark.parametrize("tool_format", [TAGS, JSON], ids=["tags", "json"])
def test_a_forced_token_of_a_call_is_the_only_one_allowed(tool_format: ToolFormat) -> None:
    declared = [WEATHER, NOW, tool("wea", {"on": {"type": "boolean"}, "x": OPTIONAL})]
    for seed in range(12):
        constraint, random = (
            accept(tool_constraint(declared, tool_format), [START]),
            np.random.default_rng(seed),
        )
        for _ in range(30):
            for token in constraint.forced():
                assert allowed(constraint) == [token]
                accept(constraint, [token])
            if constraint.complete:
                break
            accept(constraint, [int(random.choice(allowed(constraint)))])


def test_the_parser_is_shown_plain_types() -> None:
    [shown] = plain_tools([tool("f", {"a": OPTIONAL, "b": {"type": ["string", "null"]}, "c": {}})])
    types = {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "object"}}
    assert shown["function"]["parameters"]["properties"] == types
