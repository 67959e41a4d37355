"""JSON Schema as evaluation understands it, case by case, and with generated values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.errors import OptionError
from flash_moe.evaluation.json_schema import TYPES, canonical, check_schema, faults, same, valid
from tests.strategies import json_values

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "as on the door"},
        "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ({"name": "x"}, PERSON, True),
        ({"name": "x", "age": None, "tags": ["a", "b"]}, PERSON, True),
        ({"name": "x", "age": 3.0}, PERSON, True),
        ({"age": 3}, PERSON, False),
        ({"name": "x", "age": -1}, PERSON, False),
        ({"name": "x", "age": 151}, PERSON, False),
        ({"name": "x", "age": 1.5}, PERSON, False),
        ({"name": "x", "age": True}, PERSON, False),
        ({"name": "x", "tags": []}, PERSON, False),
        ({"name": "x", "tags": ["a", "b", "a"]}, PERSON, False),
        ({"name": "x", "tags": ["c"]}, PERSON, False),
        ({"name": "x", "more": 1}, PERSON, False),
        ([], PERSON, False),
        ({"x": 1}, {"additionalProperties": {"type": "integer"}}, True),
        ({"x": "1"}, {"additionalProperties": {"type": "integer"}}, False),
        ("of another type", {"minimum": 3, "required": ["x"], "minItems": 1}, True),
        (1, {"enum": [1.0]}, True),
        (True, {"enum": [1]}, False),
        (10**400, {"type": "integer"}, True),
        (None, {}, True),
        ("🏳️‍🌈", {"minLength": 4, "maxLength": 4}, True),
        ("ab", {"minLength": 3}, False),
        ("ab", {"maxLength": 1}, False),
        (7, {"maxLength": 0}, True),
        (7, {"anyOf": [{"type": "string"}, {"maximum": 7}]}, True),
        (8, {"anyOf": [{"type": "string"}, {"maximum": 7}]}, False),
        (8, {"anyOf": [{}], "maximum": 7}, False),
    ],
)
def test_cases(value: Any, schema: dict[str, Any], expected: bool) -> None:
    check_schema(schema)
    assert valid(value, schema) is expected


def test_every_fault_is_named() -> None:
    assert list(faults({"age": 1.5, "tags": ["c"], "more": 0}, PERSON)) == [
        "the value lacks 'name'",
        "the value.age is not of type ['integer', 'null']",
        "the value.tags[0] is none of ['a', 'b']",
        "the value may not have 'more'",
    ]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"pattern": "x"}, "the schema uses 'pattern'"),
        ({"items": {"items": {"oneOf": []}}}, "the schema.items.items uses 'oneOf'"),
        ({"properties": {"x": {"const": 1}}}, "the schema.x uses 'const'"),
        ({"additionalProperties": {"format": "email"}}, "additionalProperties uses 'format'"),
        ({"anyOf": [{}, {"format": "email"}]}, "the schema.anyOf[1] uses 'format'"),
        ({"maxLength": "3"}, "'maxLength' cannot be"),
        ({"type": "int"}, "'type' cannot be 'int'"),
        ({"type": []}, "'type' cannot be"),
        ({"minItems": -1}, "'minItems' cannot be"),
        ({"maximum": "3"}, "'maximum' cannot be"),
        ({"required": "x"}, "'required' cannot be"),
        ({"properties": {"x": True}}, "the schema.x is True, not an object"),
        ([], "the schema is [], not an object"),
    ],
)
def test_unsupported_schemas_are_errors(schema: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_schema(schema)
    assert message in str(caught.value)


def _schema_of(value: Any) -> dict[str, Any]:
    """The tightest schema of one value."""
    if isinstance(value, dict):
        properties = {key: _schema_of(inner) for key, inner in value.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(value),
            "additionalProperties": False,
        }
    if isinstance(value, list):
        size = len(value)
        # One schema for all items, so other orders and repetitions are valid, too.
        return {"type": "array", "minItems": size, "maxItems": size, "items": {"enum": value}}
    return {"enum": [value]}


finite = json_values.filter(lambda value: "NaN" not in json.dumps(value))


@given(finite, finite)
def test_a_value_fits_the_schema_made_of_it_and_others_do_not(value: Any, other: Any) -> None:
    schema = _schema_of(value)
    check_schema(schema)
    assert valid(value, schema)
    assert valid(json.loads(json.dumps(value)), schema)
    if "[" not in json.dumps(value):  # items in another order are valid, too
        assert valid(other, schema) == same(value, other)


@given(finite)
def test_a_value_has_one_type_or_is_an_integer_too(value: Any) -> None:
    kinds = [kind for kind in TYPES if valid(value, {"type": kind})]
    assert len(kinds) == 1 or kinds == ["integer", "number"]


@given(st.dictionaries(st.text(max_size=3), finite, min_size=2))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert canonical(dict(reversed(value.items()))) == canonical(value)
