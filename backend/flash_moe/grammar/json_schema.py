"""A JSON Schema as llguidance takes it, and what is wrong with one that it does not take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flash_moe.errors import OptionError

Schema = dict[str, Any]

# One way to write each value, json.dumps's, which is what models have seen most. With free white
# space a model of few bits writes nothing else, and fewer tokens are forced.
WRITTEN = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}

# Keywords whose values are schemas: one, a list of them, or a table of them.
ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
TABLES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
DEFINITIONS = ("$defs", "definitions")
CHOICES = ("enum", "const")
# Bounds and which way they point. Those of int64, which some generators write everywhere, are no
# wish; beyond what float64 counts exactly the library's own are a little off.
BOUNDS = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1}
FARTHEST = 2**53 - 1
# At the ends of int64 the library (1.9.1) crashes with the process, or changes the number.
LARGEST_CHOICE = 10**18
OBJECT = ("properties", "required", "additionalProperties", "patternProperties")


def prepared(schema: Schema) -> Schema:
    """The same values, less the additional properties that were never asked for: an object that
    names its properties has those alone, unless it says otherwise."""
    schema = json.loads(json.dumps(schema))
    closed = not any(_intersects(node) for _, node in parts(schema))
    for _, node in parts(schema):
        _tidy(node)
        if closed:
            _close(node)
    return {**schema, "x-guidance": WRITTEN}


def require_schema(schema: Any) -> None:
    """OptionError, unless a grammar can be made of it; names the keyword that prevents it."""
    if not isinstance(schema, dict):
        raise OptionError(f"The schema is {schema!r:.40}, not an object.")
    try:
        _require_numbers(prepared(schema))
        whole = _error(schema)
        if not whole:
            return
        where, keyword, value, reason = _culprit(schema, schema, "the schema") or (
            *("the schema", None, None),
            whole,
        )
    except RecursionError as error:
        raise OptionError("The schema is nested too deeply.") from error
    except (TypeError, ValueError) as error:
        raise OptionError(f"The schema is no JSON ({error}).") from error
    shown = "" if keyword is None else f"'s {keyword!r}: {json.dumps(value)[:60]}"
    raise OptionError(f"No grammar can express {where}{shown} ({reason}).")


def parts(schema: Any, at: str = "the schema") -> Iterator[tuple[str, Schema]]:
    """Every schema inside of one, itself first."""
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
    """Closing one side of an intersection would forbid what the other side asks for."""
    joined = any(key in schema for key in ("anyOf", "oneOf", "$ref"))
    return "allOf" in schema or (joined and any(key in schema for key in OBJECT))


def _tidy(schema: Schema) -> None:
    """Without what says nothing, and with bounds that can be kept exactly."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    for key, sign in BOUNDS.items():
        bound = schema.get(key)
        if isinstance(bound, int | float) and bound * sign > FARTHEST:
            schema[key] = FARTHEST * sign


def _require_numbers(schema: Schema) -> None:
    for at, node in parts(schema):
        for number in _integers([node.get(key) for key in (*CHOICES, *BOUNDS)]):
            if abs(number) > LARGEST_CHOICE:
                raise OptionError(
                    f"{at} has the number {number!r:.24}, too large for a grammar to be exact."
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
    says = any(key in schema for key in ("additionalProperties", "patternProperties"))
    if properties and not says and all(name in properties for name in required):
        schema["additionalProperties"] = False


def _error(schema: Schema) -> str:
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(prepared(schema)))
        return one_line(LLMatcher.validate_grammar(grammar))
    except ValueError as error:
        return one_line(str(error))
    except BaseException as error:
        # A panic of the library's Rust is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        return "the library gives up"


def one_line(error: str) -> str:
    """What the library says of a grammar, without the text of it and the parser's state."""
    said = [line.strip() for line in error.partition("<state>")[0].splitlines() if line.strip()]
    # Of a regular expression, the last line has the reason, after a drawing of the place.
    reasons = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return next(iter(reasons + said), "")[:200]


def _culprit(schema: Schema, root: Schema, at: str) -> tuple[str, str | None, Any, str] | None:
    """The innermost schema that is refused on its own, and which of its keywords is why."""
    definitions = {key: root[key] for key in DEFINITIONS if key in root}
    for where, child in _children(schema, at):
        if isinstance(child, dict) and _error({**definitions, **child}):
            return _culprit(child, root, where)
    own = {key: value for key, value in schema.items() if key not in DEFINITIONS}
    constraining = [key for key in own if key != "type"]
    for key in constraining:
        if reason := _error({**definitions, **_typed(schema), key: own[key]}):
            return at, key, own[key], reason
    for key in constraining:
        rest = {name: value for name, value in own.items() if name != key}
        if (reason := _error({**definitions, **own})) and not _error({**definitions, **rest}):
            return at, key, own[key], reason
    return None


def _typed(schema: Schema) -> Schema:
    return {"type": schema["type"]} if "type" in schema else {}
