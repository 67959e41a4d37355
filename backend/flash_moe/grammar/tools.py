"""The grammars of a call, from behind the token that starts it to the one that ends it.

One for each of mlx-lm's parsers that we know how to please; written for llguidance, in its Lark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from flash_moe.chat.tool_parameters import Parameter, function_of, parameter, parameters_of
from flash_moe.errors import OptionError
from flash_moe.grammar.json_schema import DEFINITIONS, Schema, one_line, prepared, require_schema

# Names as the parser of tags reads them.
TAG_NAME = re.compile(r"[^\s<>]+")
# What may not stand in a bare value: its end, and what splits a reply into calls.
MARKUP = r"(?s:.*)(<\/parameter>|<\/?tool_call>)(?s:.*)"
# Of numbers without bounds; more digits than float64 holds come back as other numbers, or none.
INTEGER = r"/-?(0|[1-9][0-9]{0,14})/"
NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?/"
# Without these, parameters that name no property take no argument.
SAYS_MORE = {"additionalProperties", "patternProperties", "required", "anyOf", "oneOf", "allOf"}
NUMBER_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def tag_grammar(tools: Sequence[dict[str, Any]], end: str) -> str:
    """<function=NAME>, <parameter=KEY> and values between them: Qwen3-Coder and Qwen3.5."""
    rules, calls = ["%llguidance {}"], []
    for number, tool in enumerate(tools):
        function = function_of(tool)
        name, root = _name(function), parameters_of(function)
        _require_tag_name(name, "tool")
        required = set(root.get("required", ()))
        sequence = [_quoted(f"{name}>\n")]
        for place, (key, schema) in enumerate(root.get("properties", {}).items()):
            _require_tag_name(key, f"parameter of {name!r}")
            rule = f"p{number}_{place}"
            what = f"the parameter {key!r} of the tool {name!r}"
            rules += _tagged(rule, key, parameter(schema, root), root, what)
            sequence.append(rule if key in required else f"{rule}?")
        if unknown := required - root.get("properties", {}).keys():
            raise OptionError(
                f"The tool {name!r} requires {min(unknown)!r}, and does not say what."
            )
        rules.append(f"f{number}: {' '.join(sequence)}")
        calls.append(f"f{number}")
    body = f'"\\n<function=" ({" | ".join(calls)}) "</function>\\n"'
    return "\n".join([*rules, f"start: {body} {end}"])


def json_grammar(tools: Sequence[dict[str, Any]], end: str) -> str:
    """{"name": …, "arguments": …}: Qwen3 and Hermes."""
    rules, calls = ["%llguidance {}"], []
    for number, tool in enumerate(tools):
        function = function_of(tool)
        name = json.dumps(_name(function), ensure_ascii=False)
        schema = {**parameters_of(function), "type": "object"}
        if not schema.get("properties") and not schema.keys() & SAYS_MORE:
            schema["additionalProperties"] = False
        require_schema(schema)
        rules.append(f"a{number}: %json {json.dumps(prepared(schema))}")
        opening = _quoted(f'{{"name": {name}, "arguments": ')
        rules.append(f'f{number}: {opening} a{number} "}}"')
        calls.append(f"f{number}")
    # Templates differ in whether the object has lines of its own.
    return "\n".join([*rules, f'start: "\\n"? ({" | ".join(calls)}) "\\n"? {end}'])


# The names of mlx-lm's parsers → (what starts a call, the grammar of the rest).
Writer = Callable[[Sequence[dict[str, Any]], str], str]
GRAMMARS: dict[str, Writer] = {"qwen3_coder": tag_grammar, "json_tools": json_grammar}


def _tagged(rule: str, key: str, found: Parameter, root: Schema, what: str) -> list[str]:
    """Rules for one parameter with its tags; the first of them is `rule`."""
    head, tail = _quoted(f"<parameter={key}>\n"), _quoted("\n</parameter>\n")
    if found.kind == "text" and found.choices is None:
        terminal = f"T{rule.upper()}"
        # Lazy, up to the first end: the regular expression cannot know where it is.
        return [
            f"{rule}: {head} {rule}_v",
            f"{rule}_v[lazy]: {terminal} {tail}",
            f"{terminal}: {_text(found, what)}",
        ]
    return [f"{rule}: {head} {rule}_v {tail}", f"{rule}_v: {_value(found, root, what)}"]


def _value(found: Parameter, root: Schema, what: str) -> str:
    null = ' | "null"' if found.nullable else ""
    schema = found.schema
    if found.kind == "text":
        # The parser takes the word null for null, in any case.
        texts = [text for text in found.choices or () if text.lower() != "null"]
        if not texts or any(re.search(MARKUP.replace(r"\/", "/"), text) for text in texts):
            raise OptionError(f"{what}: none of {found.choices} can be said in this model's calls.")
        return " | ".join(map(_quoted, texts)) + null
    if found.kind == "boolean":
        # Templates write Python's words in earlier calls, and models follow.
        return f'"true" | "false" | "True" | "False"{null}'
    if found.kind in ("integer", "number") and not any(key in schema for key in NUMBER_BOUNDS):
        return (INTEGER if found.kind == "integer" else NUMBER) + null
    whole = {**{key: root[key] for key in DEFINITIONS if key in root}, **schema}
    require_schema(whole)
    return f"%json {json.dumps(prepared(whole))}{null}"


def _text(found: Parameter, what: str) -> str:
    """A terminal for bare text. `format` is left to the tool: it is written for JSON strings."""
    least, most = found.schema.get("minLength", 0), found.schema.get("maxLength", "")
    wanted = [f"/(?s:.{{{least},{most}}})/" if (least or most != "") else "/(?s:.*)/"]
    if "pattern" in found.schema:
        wanted.append(_pattern(str(found.schema["pattern"]), what))
    null = "" if found.nullable else " & ~/(?i:null)/"
    return f"{' & '.join(wanted)} & ~/{MARKUP}/{null}"


def _pattern(pattern: str, what: str) -> str:
    """A pattern that may match anywhere as one that matches the whole."""
    from llguidance import LLMatcher

    body = pattern.removeprefix("^")
    open_end = not body.endswith("$") or body.endswith("\\$")
    body = body if open_end else body[:-1]
    body = re.sub(
        r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), body
    )
    anything = "(?s:.*)"
    before, after = "" if pattern.startswith("^") else anything, anything if open_end else ""
    terminal = f"/{before}({body}){after}/"
    if error := LLMatcher.validate_grammar(f"start: TEXT\nTEXT: {terminal}"):
        raise OptionError(
            f"{what} uses 'pattern': {pattern!r:.60}, which a grammar cannot express "
            f"({one_line(error)})."
        )
    return terminal


def _name(function: dict[str, Any]) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise OptionError(f"A tool without a name: {json.dumps(function)[:80]}.")
    return name


def _require_tag_name(name: str, what: str) -> None:
    if not TAG_NAME.fullmatch(name):
        raise OptionError(
            f"{name!r} cannot be the name of a {what}: this model's calls have no place for "
            "spaces, '<' and '>' in names."
        )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
