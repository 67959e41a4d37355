"""Prepare a JSON Schema for llguidance, and find the keyword for which it refuses one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flash_moe.chat.tool_parameters import DEFINITIONS, Schema
from flash_moe.errors import OptionError

# One way to write each value, that of json.dumps, which models have seen most. If white space is
# free, a model of few bits writes nothing else, and fewer tokens are forced.
WRITING_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}

# Keywords whose values are schemas: one, a list, or a table by name.
ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
TABLES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
CHOICES = ("enum", "const")
# Bounds and their direction. Some generators write those of int64 everywhere, without meaning them;
# beyond the integers that float64 counts exactly, llguidance's are a little off.
BOUNDS = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1}
FARTHEST = 2**53 - 1
# At the ends of int64, llguidance 1.9.1 crashes the process or changes the number; it rounds to
# float64 all that are between.
LARGEST_CHOICE = 10**18
OBJECT = ("properties", "required", "additionalProperties", "patternProperties")


def prepared(schema: Schema) -> Schema:
    """A copy for llguidance. An object that declares properties allows no others, unless it says
    so; apart from that, the same values are valid."""
    schema = json.loads(json.dumps(schema))
    closed = not any(_intersects(node) for _, node in parts(schema))
    for _, node in parts(schema):
        _tidy(node)
        if closed:
            _close(node)
    return {**schema, "x-guidance": WRITING_STYLE}


def require_schema(schema: Any, subject: str = "the schema") -> None:
    """OptionError, unless a grammar can express the schema; names the keyword that prevents it."""
    if not isinstance(schema, dict):
        raise OptionError(f"No grammar can express {subject}: {schema!r:.40} is not an object.")
    try:
        _require_exact_numbers(prepared(schema), subject)
        reason = _error(schema)
        culprit = _culprit(schema, schema, subject) if reason else None
    except RecursionError as error:
        raise OptionError(f"No grammar can express {subject}: it is nested too deeply.") from error
    except (TypeError, ValueError) as error:
        raise OptionError(f"No grammar can express {subject}: it is not JSON ({error}).") from error
    if culprit is not None:
        raise OptionError(f"No grammar can express {culprit}.")
    if reason:
        raise OptionError(f"No grammar can express {subject} ({reason}).")


def parts(schema: Any, at: str = "the schema") -> Iterator[tuple[str, Schema]]:
    """Every schema within one, with its place; itself first."""
    if isinstance(schema, dict):
        yield at, schema
        for where, child in _children(schema, at):
            yield from parts(child, where)


def _children(schema: Schema, at: str) -> Iterator[tuple[str, Any]]:
    for key, value in schema.items():
        if key in TABLES and isinstance(value, dict):
            yield from ((f"{at}.{name}", inner) for name, inner in value.items())
        elif key in LISTS and isinstance(value, list):
            yield from ((f"{at}.{key}[{n}]", inner) for n, inner in enumerate(value))
        elif key in ONE:
            yield f"{at}.{key}", value


def _intersects(schema: Schema) -> bool:
    """Closing one side of an intersection would forbid the properties of the other side."""
    joined = any(key in schema for key in ("anyOf", "oneOf", "$ref"))
    return "allOf" in schema or (joined and any(key in schema for key in OBJECT))


def _tidy(schema: Schema) -> None:
    """Drop a keyword without meaning, and bring bounds to where they are exact."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    for key, sign in BOUNDS.items():
        bound = schema.get(key)
        if isinstance(bound, int | float) and bound * sign > FARTHEST:
            schema[key] = FARTHEST * sign


def _require_exact_numbers(schema: Schema, subject: str) -> None:
    for at, node in parts(schema, subject):
        for number in _integers([node.get(key) for key in (*CHOICES, *BOUNDS)]):
            if abs(number) > LARGEST_CHOICE or float(number) != number:
                raise OptionError(
                    f"No grammar can express {number!r:.24} in {at}: it is too large to be exact."
                )


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _integers(inner)


def _close(schema: Schema) -> None:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return
    explicit = any(key in schema for key in ("additionalProperties", "patternProperties"))
    if properties and not explicit and all(name in properties for name in required):
        schema["additionalProperties"] = False


def _error(schema: Schema) -> str:
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(prepared(schema)))
        return one_line(LLMatcher.validate_grammar(grammar))
    except ValueError as error:
        return one_line(str(error))
    except BaseException as error:
        # A panic in llguidance's Rust code is not an Exception.
        if type(error).__name__ != "PanicException":
            raise
        return "llguidance gives up"


def one_line(error: str) -> str:
    """llguidance's reason, without its copy of the grammar and the parser's state."""
    lines = [line.strip() for line in error.partition("<state>")[0].splitlines() if line.strip()]
    # For a regular expression, the reason comes last, after a drawing of the place.
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(iter(reasons + lines), "")[:200]


def _culprit(schema: Schema, root: Schema, at: str) -> str | None:
    """The keyword for which the innermost schema is refused, its place, and the reason."""
    definitions = {key: root[key] for key in DEFINITIONS if key in root}
    for where, child in _children(schema, at):
        if isinstance(child, dict) and _error({**definitions, **child}):
            return _culprit(child, root, where)
    own = {key: value for key, value in schema.items() if key not in DEFINITIONS}
    for key, reason in _refused_keywords(own, definitions):
        return f"{key!r}: {json.dumps(own[key])[:60]} in {at} ({reason})"
    return None


def _refused_keywords(schema: Schema, definitions: Schema) -> Iterator[tuple[str, str]]:
    """Keywords that are refused by themselves; then those without which the rest is accepted."""
    type_only = {"type": schema["type"]} if "type" in schema else {}
    keywords = [key for key in schema if key != "type"]
    for key in keywords:
        if reason := _error({**definitions, **type_only, key: schema[key]}):
            yield key, reason
    reason = _error({**definitions, **schema})
    for key in keywords if reason else []:
        rest = {name: value for name, value in schema.items() if name != key}
        if not _error({**definitions, **rest}):
            yield key, reason
