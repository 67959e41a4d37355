"""Validates values against the part of JSON Schema that held-out data uses.

Any other keyword is an error: ignoring one would call invalid replies valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flash_moe.errors import OptionError

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
KEYWORDS = {
    *("type", "enum", "properties", "required", "additionalProperties", "items"),
    *("minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "anyOf"),
    # For people: they neither allow nor forbid anything.
    *("title", "description"),
}


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON value satisfies a schema that `check_schema` accepts."""
    return not any(faults(value, schema))


def check_schema(schema: Any, at: str = "the schema") -> None:
    """OptionError, unless every part of a schema is one that `faults` understands."""
    if not isinstance(schema, dict):
        raise OptionError(f"{at} is {schema!r:.40}, not an object.")
    if unknown := schema.keys() - KEYWORDS:
        raise OptionError(
            f"{at} uses {min(unknown)!r}, which is not supported. "
            f"Supported: {', '.join(sorted(KEYWORDS))}."
        )
    for key, value in schema.items():
        if not _well_formed(key, value):
            raise OptionError(f"{at}: {key!r} cannot be {value!r:.60}.")
    for name, inner in schema.get("properties", {}).items():
        check_schema(inner, f"{at}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema and not isinstance(schema[key], bool):
            check_schema(schema[key], f"{at}.{key}")
    for number, inner in enumerate(schema.get("anyOf", ())):
        check_schema(inner, f"{at}.anyOf[{number}]")


def faults(value: Any, schema: dict[str, Any], at: str = "the value") -> Iterator[str]:
    """Everything that is wrong with a value."""
    kinds = schema.get("type", TYPES)
    if not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        yield f"{at} is not of type {kinds}"
    if "enum" in schema and not any(same(value, choice) for choice in schema["enum"]):
        yield f"{at} is none of {schema['enum']}"
    if "anyOf" in schema and not any(valid(value, choice) for choice in schema["anyOf"]):
        yield f"{at} fits nothing in anyOf"
    # Every keyword below concerns one type alone, and ignores values of others.
    if _is(value, "number"):
        if value < schema.get("minimum", value):
            yield f"{at} is less than {schema['minimum']}"
        if value > schema.get("maximum", value):
            yield f"{at} is more than {schema['maximum']}"
    elif isinstance(value, str):
        # In characters, as the standard counts, not in bytes.
        if len(value) < schema.get("minLength", 0):
            yield f"{at} is shorter than {schema['minLength']}"
        if len(value) > schema.get("maxLength", len(value)):
            yield f"{at} is longer than {schema['maxLength']}"
    elif isinstance(value, list):
        yield from _array_faults(value, schema, at)
    elif isinstance(value, dict):
        yield from _object_faults(value, schema, at)


def same(left: Any, right: Any) -> bool:
    """Equal as JSON: 1 equals 1.0 but not true, and the order of keys does not matter."""
    return canonical(left) == canonical(right)


def canonical(value: Any) -> str:
    """One text for all JSON values that are equal."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _array_faults(value: list[Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    if len(value) < schema.get("minItems", 0):
        yield f"{at} has fewer than {schema['minItems']} items"
    if len(value) > schema.get("maxItems", len(value)):
        yield f"{at} has more than {schema['maxItems']} items"
    for number, item in enumerate(value):
        yield from faults(item, schema.get("items", {}), f"{at}[{number}]")


def _object_faults(value: dict[str, Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{at} lacks {name!r}"
    other = schema.get("additionalProperties", True)
    for name, inner in value.items():
        if name in properties:
            yield from faults(inner, properties[name], f"{at}.{name}")
        elif other is False:
            yield f"{at} may not have {name!r}"
        elif isinstance(other, dict):
            yield from faults(inner, other, f"{at}.{name}")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        integer = isinstance(value, int) or value.is_integer()
        return kind == "number" or (kind == "integer" and integer)
    names: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return names.get(type(value)) == kind


def _well_formed(key: str, value: Any) -> bool:
    if key == "type":
        kinds = [value] if isinstance(value, str) else value
        return isinstance(kinds, list) and bool(kinds) and all(kind in TYPES for kind in kinds)
    if key in ("minItems", "maxItems", "minLength", "maxLength"):
        return type(value) is int and value >= 0
    if key in ("minimum", "maximum"):
        return _is(value, "number")
    if key == "required":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if key in ("title", "description"):
        return isinstance(value, str)
    # What is inside of these is checked by itself.
    allowed: dict[str, type | tuple[type, ...]] = {
        "enum": list,
        "anyOf": list,
        "properties": dict,
        "items": dict,
        "additionalProperties": (bool, dict),
    }
    return isinstance(value, allowed[key])
