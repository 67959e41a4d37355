"""Calls of tools, character by character: what a grammar lets through, and what the parser makes
of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mlx_lm.tool_parsers import glm47, json_tools, qwen3_coder

from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.chat.tool_parameters import plain_tools
from flash_moe.errors import OptionError
from flash_moe.grammar.constraints import Constraint
from flash_moe.grammar.grammar import Grammar
from tests.grammar.test_grammar import CLOSES, OPENS, STOPS, TOKENIZER, allowed, ids, prompt, say


def format_of(name: str, module: Any) -> ToolFormat:
    return ToolFormat(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call)


TAGS = format_of("qwen3_coder", qwen3_coder)
JSON = format_of("json_tools", json_tools)
[START], [END] = ids("<tool_call>"), ids("</tool_call>")


def tool(name: str, properties: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """As llm and OpenAI's interface write them; `required` and the like in `more`."""
    parameters = {"type": "object", "properties": properties or {}, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def held(declared: list[dict[str, Any]], form: ToolFormat = TAGS, **options: Any) -> Constraint:
    found = Grammar.for_tools(TOKENIZER, declared, form).constraint(prompt(), **options)
    assert found is not None
    return found


def takes(declared: list[dict[str, Any]], text: str, form: ToolFormat = TAGS) -> bool:
    constraint = held(declared, form)
    for token in ids(text):
        mask = constraint.mask()
        if mask is not None and not (token < len(mask) and mask[token]):
            return False
        constraint.accept(token)
    return constraint.complete


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
    assert takes([WEATHER, NOW], text) is expected
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
    assert takes([WEATHER, NOW], whole, JSON) is expected
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
    """With types that the parser alone takes for text, or for something else."""
    definitions = {"side": SIDE, "unit": {"type": "string", "enum": ["C", "F"]}}
    declared = [tool("f", {"x": schema}, required=["x"], **{"$defs": definitions})]
    said = call("f", x=text)
    assert takes(declared, said)
    assert TAGS.calls(said, declared) == [{"name": "f", "arguments": {"x": value}}]


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
    assert takes(declared, call("f", x=yes))
    assert not takes(declared, call("f", x=no))


def test_names_that_begin_alike() -> None:
    declared = [tool("get"), tool("get_all", {"a": {}, "a b-c".replace(" ", "_"): {}})]
    assert takes(declared, call("get"))
    assert takes(declared, call("get_all", a="1"))
    assert not takes(declared, call("get_"))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([], "no tools"),
        ([{"type": "function", "function": {"parameters": {}}}], "without a name"),
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


def test_formats_without_a_grammar_are_left_alone_and_say_so() -> None:
    unknown = format_of("glm47", glm47)
    elsewhere = ToolFormat("qwen3_coder", "<no token>", "</tool_call>", TAGS.parse)
    for form in (unknown, elsewhere, None):
        grammar = Grammar.for_tools(TOKENIZER, [NOW], form)
        assert not grammar.constrains
        assert grammar.constraint(prompt()) is None
    assert Grammar.for_tools(TOKENIZER, [NOW], TAGS).constrains


def test_nothing_is_masked_outside_of_calls() -> None:
    constraint = held([NOW])
    for _ in range(2):
        assert (constraint.mask(), constraint.forced(), constraint.complete) == (None, [], True)
        say(constraint, [*ids("Well."), START])
        assert not constraint.complete
        # One tool without parameters leaves nothing to choose.
        while tokens := constraint.forced():
            say(constraint, tokens)
    assert not constraint.finished
    say(constraint, [min(STOPS)])


def test_a_call_in_a_thought_is_a_thought() -> None:
    found = Grammar.for_tools(TOKENIZER, [NOW], TAGS).constraint(prompt(thinking=True))
    assert found is not None
    say(found, [START, *ids("anything")])
    assert found.mask() is None
    say(found, [CLOSES, START])
    assert allowed(found) == ids("\n")


def test_a_model_may_think_again_before_it_calls() -> None:
    constraint = held([NOW], thinking_budget=2)
    say(constraint, [OPENS, *ids("a"), *ids("b")])
    assert constraint.forced() == ids("\n</think>\n\n")


def test_calling_at_once() -> None:
    constraint = held([NOW], call_at_once=True)
    assert not constraint.complete
    assert constraint.forced() == [START]
    said: list[int] = []
    while tokens := constraint.forced():
        said += tokens
        say(constraint, tokens)
    assert said[-1] == END
    assert TAGS.calls(TOKENIZER.tokenizer.decode(said), [NOW]) == [{"name": "now", "arguments": {}}]
    assert constraint.complete


@pytest.mark.parametrize("form", [TAGS, JSON], ids=["tags", "json"])
def test_a_forced_token_of_a_call_is_the_only_one_allowed(form: ToolFormat) -> None:
    declared = [WEATHER, NOW, tool("wea", {"on": {"type": "boolean"}, "x": OPTIONAL})]
    for seed in range(12):
        constraint, random = say(held(declared, form), [START]), np.random.default_rng(seed)
        for _ in range(30):
            for token in constraint.forced():
                assert allowed(constraint) == [token]
                say(constraint, [token])
            if constraint.complete:
                break
            say(constraint, [int(random.choice(allowed(constraint)))])


def test_tools_for_the_parsers_eyes_have_plain_types() -> None:
    [shown] = plain_tools([tool("f", {"a": OPTIONAL, "b": {"type": ["string", "null"]}, "c": {}})])
    types = {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "object"}}
    assert shown["function"]["parameters"]["properties"] == types
