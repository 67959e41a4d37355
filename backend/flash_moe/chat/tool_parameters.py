"""How the value of a parameter is written where a call is tags around text, not JSON.

Text stands bare, all else is JSON. mlx-lm's parser tells them apart by the declared type alone,
and takes everything without a plain one for text: `Optional[int]`, which JSON Schema writes with
`anyOf`, would come back as "5". So the parser is shown plain types, and grammars follow the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flash_moe.grammar.json_schema import DEFINITIONS, Schema

# References to references; more is a circle.
MOST_HOPS = 16
PLAIN = ("string", "integer", "number", "boolean")


@dataclass(frozen=True, slots=True)
class Parameter:
    """`schema` is the declared one, followed to where it is defined, without null."""

    kind: Literal["text", "integer", "number", "boolean", "json"]
    nullable: bool
    schema: Schema

    @property
    def choices(self) -> list[Any] | None:
        if "const" in self.schema:
            return [self.schema["const"]]
        return self.schema.get("enum")


def parameter(schema: Any, root: Schema) -> Parameter:
    """`root` is the schema of all parameters, with the definitions that may be referred to."""
    schema, nullable = _without_null(_resolved(schema, root), root)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    kind = schema.get("type")
    if isinstance(choices, list):
        texts = bool(choices) and all(isinstance(choice, str) for choice in choices)
        kind = "string" if texts and kind in (None, "string") else None
    if kind not in PLAIN or _joined(schema):
        return Parameter("json", nullable, schema)
    return Parameter("text" if kind == "string" else kind, nullable, schema)


def plain_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools for the parser's eyes: every parameter with one plain type."""
    return [_plain_tool(tool) for tool in tools]


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """{"name", "parameters"}, whether or not it is wrapped as {"type": "function"}."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def parameters_of(function: dict[str, Any]) -> Schema:
    declared = function.get("parameters")
    return _resolved(declared, declared) if isinstance(declared, dict) else {}


def _plain_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = function_of(tool)
    root = parameters_of(function)
    properties = {
        name: {"type": _plain_type(parameter(schema, root))}
        for name, schema in root.get("properties", {}).items()
    }
    plain = {**function, "parameters": {**root, "properties": properties}}
    return {"type": "function", "function": plain}


def _plain_type(found: Parameter) -> str:
    # An object is what the parser reads as JSON, of whatever type.
    return {"text": "string", "json": "object"}.get(found.kind, found.kind)


def _resolved(schema: Any, root: Schema) -> Schema:
    for _ in range(MOST_HOPS):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            break
        kind, _, name = schema["$ref"].removeprefix("#/").partition("/")
        found = root.get(kind, {}).get(name) if kind in DEFINITIONS else None
        if not isinstance(found, dict):
            break
        schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema if isinstance(schema, dict) else {}


def _without_null(schema: Schema, root: Schema) -> tuple[Schema, bool]:
    """What remains of a schema that allows null next to one other thing."""
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        if isinstance(options, list) and {"type": "null"} in options:
            rest = [option for option in options if option != {"type": "null"}]
            if len(rest) == 1:
                outer = {name: value for name, value in schema.items() if name != key}
                return {**_resolved(rest[0], root), **outer}, True
    kinds, choices = schema.get("type"), schema.get("enum")
    if isinstance(choices, list) and None in choices and choices != [None]:
        choices = [choice for choice in choices if choice is not None]
        return _without_null({**schema, "enum": choices}, root)[0], True
    if isinstance(kinds, list) and "null" in kinds and len(kinds) == 2:
        [kind] = [kind for kind in kinds if kind != "null"]
        return {**schema, "type": kind}, True
    return schema, False


def _joined(schema: Schema) -> bool:
    return any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref", "not"))
