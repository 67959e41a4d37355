"""Grammars for one tool call, from after the token that starts it to the one that ends it.

There is one for each of mlx-lm's parsers that we know how to satisfy, in llguidance's Lark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from flash_moe.chat.tool_parameters import (
    DEFINITIONS,
    Parameter,
    Schema,
    function_of,
    parameter,
    parameters_of,
)
from flash_moe.errors import OptionError
from flash_moe.grammar.json_schema import one_line, prepared, require_schema

# Names that the parser of tags can read.
TAG_NAME = re.compile(r"[^\s<>]+")
# A bare value must not contain its own end, nor the tags that split a reply into calls.
MARKUP = r"(?s:.*)(<\/parameter>|<\/?tool_call>)(?s:.*)"
# Numbers without bounds; with more digits than float64 holds, the parser would change them.
INTEGER = r"/-?(0|[1-9][0-9]{0,14})/"
NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?/"
# Parameters with neither properties nor any of these take no arguments.
ALLOWING = {"additionalProperties", "patternProperties", "required", "anyOf", "oneOf", "allOf"}
NUMBER_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def tag_grammar(tools: Sequence[dict[str, Any]], end: str) -> str:
    """Qwen3-Coder's and Qwen3.5's: <function=NAME>, <parameter=KEY> and values between them."""
    rules, calls = ["%llguidance {}"], []
    for number, tool in enumerate(tools):
        function = function_of(tool)
        name, root = _name(function), parameters_of(function)
        _require_tag_name(name, "tool")
        if "$ref" in root:
            raise OptionError(
                f"The parameters of the tool {name!r} use '$ref': {json.dumps(root['$ref'])[:60]}, "
                "which a grammar cannot follow."
            )
        required = set(root.get("required", ()))
        sequence = [_quoted(f"{name}>\n")]
        for place, (key, schema) in enumerate(root.get("properties", {}).items()):
            _require_tag_name(key, f"parameter of {name!r}")
            rule = f"p{number}_{place}"
            subject = f"the parameter {key!r} of the tool {name!r}"
            rules += _tagged(rule, key, parameter(schema, root), root, subject)
            sequence.append(rule if key in required else f"{rule}?")
        if unknown := required - root.get("properties", {}).keys():
            raise OptionError(
                f"The tool {name!r} requires {min(unknown)!r}, which is not one of its parameters."
            )
        rules.append(f"f{number}: {' '.join(sequence)}")
        calls.append(f"f{number}")
    body = f'"\\n<function=" ({" | ".join(calls)}) "</function>\\n"'
    return "\n".join([*rules, f"start: {body} {end}"])


def json_grammar(tools: Sequence[dict[str, Any]], end: str) -> str:
    """Qwen3's and Hermes': {"name": …, "arguments": …}."""
    rules, calls = ["%llguidance {}"], []
    for number, tool in enumerate(tools):
        function = function_of(tool)
        name = json.dumps(_name(function), ensure_ascii=False)
        schema = {**parameters_of(function), "type": "object"}
        if not schema.get("properties") and not schema.keys() & ALLOWING:
            schema["additionalProperties"] = False
        require_schema(schema, f"the arguments of the tool {name}")
        rules.append(f"a{number}: %json {json.dumps(prepared(schema))}")
        opening = _quoted(f'{{"name": {name}, "arguments": ')
        rules.append(f'f{number}: {opening} a{number} "}}"')
        calls.append(f"f{number}")
    # Some templates put the object on a line of its own.
    return "\n".join([*rules, f'start: "\\n"? ({" | ".join(calls)}) "\\n"? {end}'])


# By the names of mlx-lm's parsers; each takes the tools and the token that ends a call.
GrammarWriter = Callable[[Sequence[dict[str, Any]], str], str]
GRAMMARS: dict[str, GrammarWriter] = {"qwen3_coder": tag_grammar, "json_tools": json_grammar}


def _tagged(rule: str, key: str, value: Parameter, root: Schema, subject: str) -> list[str]:
    """Rules for a parameter with its tags; the first one is `rule`."""
    head, tail = _quoted(f"<parameter={key}>\n"), _quoted("\n</parameter>\n")
    if value.kind == "text" and not value.choices:
        terminal = f"T{rule.upper()}"
        # Lazy, up to the first end: the regular expression cannot know where that is.
        return [
            f"{rule}: {head} {rule}_v",
            f"{rule}_v[lazy]: {terminal} {tail}",
            f"{terminal}: {_text(value, subject)}",
        ]
    return [f"{rule}: {head} {rule}_v {tail}", f"{rule}_v: {_value(value, root, subject)}"]


def _value(value: Parameter, root: Schema, subject: str) -> str:
    null = ' | "null"' if value.nullable else ""
    schema = value.schema
    if value.kind == "text":
        return _choices(value, subject)
    if value.kind == "boolean":
        # Templates write Python's words into earlier calls, and models copy them.
        return f'"true" | "false" | "True" | "False"{null}'
    if value.kind in ("integer", "number") and not any(key in schema for key in NUMBER_BOUNDS):
        return (INTEGER if value.kind == "integer" else NUMBER) + null
    whole = {**{key: root[key] for key in DEFINITIONS if key in root}, **schema}
    require_schema(whole, subject)
    return f"%json {json.dumps(prepared(whole))}{null}"


def _choices(value: Parameter, subject: str) -> str:
    # The parser reads the word null as null, whatever its case.
    texts = [text for text in value.choices if text.lower() != "null"]
    quoted = [*map(_quoted, texts), *(['"null"'] if value.nullable else [])]
    if not quoted or any(re.search(MARKUP.replace(r"\/", "/"), text) for text in texts):
        raise OptionError(
            f"Calls of this model cannot express all choices of {subject}: "
            f"{json.dumps(value.choices)[:60]}."
        )
    return " | ".join(quoted)


def _text(value: Parameter, subject: str) -> str:
    """A terminal for bare text. `format` is ignored, since formats are meant for JSON strings."""
    least, most = value.schema.get("minLength", 0), value.schema.get("maxLength", "")
    terms = [f"/(?s:.{{{least},{most}}})/" if (least or most != "") else "/(?s:.*)/"]
    if "pattern" in value.schema:
        terms.append(_pattern(str(value.schema["pattern"]), subject))
    null = "" if value.nullable else " & ~/(?i:null)/"
    return f"{' & '.join(terms)} & ~/{MARKUP}/{null}"


def _pattern(pattern: str, subject: str) -> str:
    """JSON Schema's patterns match anywhere in a text, a terminal's match all of it."""
    from llguidance import LLMatcher

    body = pattern.removeprefix("^")
    open_end = not body.endswith("$") or body.endswith("\\$")
    body = body if open_end else body[:-1]
    body = re.sub(
        r"\\.|/|\n", lambda match: {"/": r"\/", "\n": r"\n"}.get(match[0], match[0]), body
    )
    anything = "(?s:.*)"
    before, after = "" if pattern.startswith("^") else anything, anything if open_end else ""
    terminal = f"/{before}({body}){after}/"
    if error := LLMatcher.validate_grammar(f"start: TEXT\nTEXT: {terminal}"):
        raise OptionError(
            f"No grammar can express 'pattern': {json.dumps(pattern)[:60]} in {subject} "
            f"({one_line(error)})."
        )
    return terminal


def _name(function: dict[str, Any]) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise OptionError(f"A tool has no name: {json.dumps(function)[:80]}.")
    return name


def _require_tag_name(name: str, owner: str) -> None:
    if not TAG_NAME.fullmatch(name):
        raise OptionError(
            f"{name!r} cannot be the name of a {owner}: in calls of this model, names cannot "
            "contain spaces, '<' or '>'."
        )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
