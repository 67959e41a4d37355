"""Schemas and tools as they come, small enough that noise comes to an end within them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

# Keys and choices that have to be escaped, cut into several tokens, or that look like markup.
AWKWARD = [
    "a",
    "name",
    "the machine",
    "é",
    "漢字",
    'q"',
    "b\\",
    "n\n",
    "",
    "🦙",
    "{",
    "</think>",
    "1",
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    # Those that float64 holds: the others are refused.
    st.integers(-(10**18), 10**18).map(lambda number: int(float(number))),
    st.floats(-1e6, 1e6).map(lambda number: round(number, 3)),
    st.sampled_from(AWKWARD),
)


@st.composite
def bounded(draw: st.DrawFn, kind: str, low: int, high: int, least: str, most: str) -> Schema:
    schema: Schema = {"type": kind}
    lowest = draw(st.integers(low, high))
    if draw(st.booleans()):
        schema[least] = lowest
    schema[most] = draw(st.integers(lowest, high))
    return schema


texts = bounded("string", 0, 9, "minLength", "maxLength")
numbers = (
    bounded("integer", -120, 1200, "minimum", "maximum")
    | bounded("number", -30, 30, "minimum", "maximum")
    | st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": ["integer", "null"]}])
)
choices = st.lists(scalars, min_size=1, max_size=4).map(lambda values: {"enum": values})
leaves = texts | numbers | choices | st.sampled_from([{"type": "null"}, {"type": "boolean"}])


def _objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    @st.composite
    def make(draw: st.DrawFn) -> Schema:
        properties = draw(st.dictionaries(st.sampled_from(AWKWARD), inner, max_size=3))
        required = [name for name in properties if draw(st.booleans())]
        schema = {"type": "object", "properties": properties, "required": required}
        # Mostly closed: noise does not come to the end of a key that it makes up.
        more = draw(st.sampled_from([False, False, False, None, True, {"type": "boolean"}]))
        return schema if more is None else {**schema, "additionalProperties": more}

    return make()


def _arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    lists = bounded("array", 0, 3, "minItems", "maxItems")
    return st.tuples(lists, inner).map(lambda pair: {**pair[0], "items": pair[1]})


def _alternatives(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})


schemas = st.recursive(
    leaves, lambda inner: _objects(inner) | _arrays(inner) | _alternatives(inner), max_leaves=6
)

names = st.sampled_from(["get", "get_x", "run-sql", "größe", "a.b", "null"])
# As Python's annotations become schemas: plain, optional, of several types, and nested.
optional = leaves.map(lambda schema: {"anyOf": [schema, {"type": "null"}]})
words = st.lists(st.sampled_from(["celsius", "a b", "1", "null", "x\ny"]), min_size=1)
declared = st.one_of(
    leaves,
    optional,
    words.filter(lambda texts: texts != ["null"] * len(texts)).map(
        lambda texts: {"type": "string", "enum": texts}
    ),
    texts.map(lambda schema: {**schema, "type": ["string", "null"]}),
    schemas,
)


@st.composite
def tools(draw: st.DrawFn) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "parameters": draw(_parameters())}}
        for name in draw(st.lists(names, min_size=1, max_size=3, unique=True))
    ]


@st.composite
def _parameters(draw: st.DrawFn) -> Schema:
    properties = draw(st.dictionaries(names, declared, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
