"""How the value of a parameter is written where a call is tags around text instead of JSON.

Text stands bare, everything else is JSON. mlx-lm's parser tells them apart by the declared type
alone and takes anything without a plain type for text: `Optional[int]`, which JSON Schema writes
with `anyOf`, would come back as "5". So the parser is shown plain types, and grammars use the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Schema = dict[str, Any]
Kind = Literal["text", "integer", "number", "boolean", "json"]

# The keywords under which a schema keeps definitions for its references.
DEFINITIONS = ("$defs", "definitions")
# References to references; a longer chain is a circle.
MOST_HOPS = 16
# JSON Schema's plain types.
PLAIN: dict[str, Kind] = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "boolean",
}
# The types to show to the parser, which reads "object" as JSON of any type.
PARSER_TYPES: dict[Kind, str] = {**{kind: name for name, kind in PLAIN.items()}, "json": "object"}
# Keywords that say which types are allowed.
COMBINING = {"anyOf", "oneOf", "allOf", "not", "if", "$ref"}
DECIDING = COMBINING | {"type", "enum", "const"}
TEXT_LIMITS = {"minLength", "maxLength", "pattern"}
# Keywords that allow and forbid nothing.
ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "$comment"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """`schema` describes the value: for "json" all of it, for the plain kinds everything but null,
    which is valid, too, if `nullable`. Text with `choices` is one of them."""

    kind: Kind
    nullable: bool
    schema: Schema
    choices: tuple[str, ...] = ()


def parameter(schema: Any, root: Schema) -> Parameter:
    """`root` is the schema of all parameters, with the definitions that `schema` refers to."""
    if not isinstance(schema, dict):
        # True allows anything, False nothing.
        schema = {"enum": []} if schema is False else {}
    return _plain(_resolved(schema, root), root) or Parameter("json", False, schema)


def plain_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools as the parser is to see them: one plain type for every parameter."""
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
        name: {"type": PARSER_TYPES[parameter(schema, root).kind]}
        for name, schema in root.get("properties", {}).items()
    }
    plain = {**function, "parameters": {**root, "properties": properties}}
    return {"type": "function", "function": plain}


def _resolved(schema: Schema, root: Schema) -> Schema:
    """With references replaced by their definitions, as far as that is possible."""
    for _ in range(MOST_HOPS):
        if not isinstance(schema.get("$ref"), str):
            break
        keyword, _, name = schema["$ref"].removeprefix("#/").partition("/")
        definitions = root.get(keyword) if keyword in DEFINITIONS else None
        definition = definitions.get(name) if isinstance(definitions, dict) else None
        siblings = {key: value for key, value in schema.items() if key != "$ref"}
        merged = _merged(definition, siblings) if isinstance(definition, dict) else None
        if merged is None:
            break
        schema = merged
    return schema


def _merged(inner: Schema, outer: Schema) -> Schema | None:
    """One schema for two that both apply; None if they differ on a keyword."""
    shared = (inner.keys() & outer.keys()) - ANNOTATIONS - set(DEFINITIONS)
    return {**inner, **outer} if all(inner[key] == outer[key] for key in shared) else None


def _plain(schema: Schema, root: Schema) -> Parameter | None:
    """The schema as one plain type, with or without null; None if it is anything else."""
    if combining := COMBINING & schema.keys():
        return _plain_option(schema, root) if len(combining) == 1 else None
    if "enum" in schema or "const" in schema:
        return _plain_choices(schema)
    types = _types(schema)
    names = types - {"null"}
    if len(names) != 1 or not names <= PLAIN.keys():
        return None
    [name] = names
    return Parameter(PLAIN[name], "null" in types, {**schema, "type": name})


def _plain_option(schema: Schema, root: Schema) -> Parameter | None:
    """The one plain type that anyOf or oneOf allows beside null."""
    keyword = "anyOf" if "anyOf" in schema else "oneOf"
    options = schema.get(keyword)
    outer = {key: value for key, value in schema.items() if key != keyword}
    if not isinstance(options, list) or DECIDING & outer.keys():
        return None
    resolved = [_resolved(option, root) for option in options if isinstance(option, dict)]
    others = [option for option in resolved if not _is_null(option)]
    nulls = len(resolved) - len(others)
    if len(resolved) < len(options) or not nulls or len(others) != 1:
        return None
    merged = _merged(others[0], outer)
    plain = None if merged is None else _plain(merged, root)
    if plain is None:
        return None
    nulls += plain.nullable
    # Of oneOf, exactly one option may match.
    return replace(plain, nullable=nulls == 1 if keyword == "oneOf" else nulls > 0)


def _plain_choices(schema: Schema) -> Parameter | None:
    choices = _choices(schema)
    texts = tuple(dict.fromkeys(choice for choice in choices if isinstance(choice, str)))
    others = [choice for choice in choices if not isinstance(choice, str)]
    if not texts or any(choice is not None for choice in others) or TEXT_LIMITS & schema.keys():
        return None
    return Parameter("text", bool(others), schema, texts)


def _is_null(schema: Schema) -> bool:
    """Whether null is the only value that a schema allows."""
    if COMBINING & schema.keys():
        return False
    if "enum" in schema or "const" in schema:
        choices = _choices(schema)
        return bool(choices) and all(choice is None for choice in choices)
    return _types(schema) == {"null"}


def _choices(schema: Schema) -> list[Any]:
    """The listed values, less texts and nulls that the type excludes; empty if malformed."""
    listed = [schema["const"]] if "const" in schema else schema["enum"]
    if not isinstance(listed, list) or {"enum", "const"} <= schema.keys():
        return []
    choices, types = listed, _types(schema)
    if types and "string" not in types:
        choices = [choice for choice in choices if not isinstance(choice, str)]
    if types and "null" not in types:
        choices = [choice for choice in choices if choice is not None]
    return choices


def _types(schema: Schema) -> set[str]:
    """Empty if the schema allows any type."""
    types = schema.get("type", [])
    return {str(name) for name in (types if isinstance(types, list) else [types])}
