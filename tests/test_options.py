"""Every option is explained in a sentence, and checked in the one place that declares it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.errors import OptionError
from flash_moe.options import (
    FULL_PHASES,
    OPTIONS,
    RUNTIMES,
    Request,
    Sampling,
    Settings,
    UserOption,
    parse,
    user_options,
)

OWNERS = {name: owner for owner in (Settings, Request) for name in user_options(owner)}
NUMBERS = {name: option for name, option in OPTIONS.items() if option.kind in (int, float)}
# Values of the type that each kind of field takes.
TYPED: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats() | st.integers(),
    str: st.text(max_size=9) | st.sampled_from(RUNTIMES),
    tuple: st.lists(st.text(max_size=9) | st.sampled_from(FULL_PHASES), max_size=3).map(tuple),
    Sequence: st.lists(st.text(max_size=9), max_size=3),
}
values = (
    st.one_of(*TYPED.values())
    | st.binary(max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
    | st.lists(st.integers(), min_size=1, max_size=3)
)


def allowed(option: UserOption, value: Any) -> bool:
    """By the words of the option's declaration."""
    limits, kind = option.option, option.kind
    if kind in (int, float):
        right = isinstance(value, int if kind is int else (int, float))
        if not right or isinstance(value, bool) or math.isnan(value):
            return False
        return (
            (limits.least is None or value >= limits.least)
            and (limits.most is None or value <= limits.most)
            and (limits.below is None or value < limits.below)
        )
    if kind in (tuple, Sequence):
        right = isinstance(value, tuple if kind is tuple else (tuple, list))
        texts = right and all(isinstance(item, str) for item in value)
        return texts and (not limits.choices or set(value) <= set(limits.choices))
    return isinstance(value, kind) and (not limits.choices or value in limits.choices)


def accepted(name: str, value: Any) -> bool:
    """Whether it can be set; if so, the field holds the very value."""
    message = ""
    try:
        settings = OWNERS[name](**{name: value})
    except OptionError as error:
        message = str(error)
    if message:
        assert re.match(rf"{name}=.*: choose .+\.$", message, re.S)
        assert OPTIONS[name].problem(value) is not None
        return False
    assert getattr(settings, name) is value
    assert OPTIONS[name].problem(value) is None
    return True


@pytest.mark.parametrize("name", OPTIONS)
def test_help_is_one_sentence(name: str) -> None:
    text = OPTIONS[name].option.help
    assert re.match("[A-Z]", text)
    assert not re.search(r"[.!?]( |$)|\n", text), text
    assert 10 < len(text) < 200


@pytest.mark.parametrize("name", OPTIONS)
@given(data=st.data())
def test_values_of_the_right_type_are_accepted_within_the_range(
    name: str, data: st.DataObject
) -> None:
    option = OPTIONS[name]
    value = data.draw(TYPED[option.kind])
    assert accepted(name, value) == allowed(option, value)


@pytest.mark.parametrize("name", OPTIONS)
@given(value=values)
def test_values_of_any_type(name: str, value: Any) -> None:
    assert accepted(name, value) == allowed(OPTIONS[name], value)


@pytest.mark.parametrize("name", NUMBERS)
def test_both_ends_of_a_range_are_allowed_and_nothing_beyond(name: str) -> None:
    limits, kind = NUMBERS[name].option, NUMBERS[name].kind
    step: Any = 1 if kind is int else 1e-9
    assert limits.least is not None
    assert accepted(name, limits.least)
    assert not accepted(name, limits.least - step)
    if limits.most is not None:
        assert accepted(name, kind(limits.most))
        assert not accepted(name, limits.most + step)
    if limits.below is not None:
        assert not accepted(name, limits.below)
        assert accepted(name, limits.below - step)


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_is_set_by_default(name: str) -> None:
    assert getattr(OWNERS[name](), name) is None
    assert getattr(OWNERS[name](**{name: None}), name) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 11, "temperature=11: choose 0 to 10."),
        ("repetition_penalty", 0, "repetition_penalty=0: choose 0.01 to 10."),
        ("presence_penalty", -3.0, "presence_penalty=-3.0: choose -2 to 2."),
        ("top_k", 2_000_000, "top_k=2000000: choose 0 to 1,000,000."),
        ("experts", 0, "experts=0: choose 1 or more."),
        ("experts", 2.5, "experts=2.5: choose a whole number."),
        ("top_p", "high", "top_p=high: choose a number."),
        ("cache_tolerance", 1.0, "cache_tolerance=1.0: choose 0 or more, and less than 1."),
        ("full_experts_in", ("songs",), "full_experts_in=songs: choose prompt or grammar."),
        ("runtime", "abacus", "runtime=abacus: choose auto, metal, cuda, native, mlx."),
        ("thinking", "yes", "thinking=yes: choose true or false."),
        ("stop", "end", "stop=end: choose a list of texts."),
    ],
)
def test_messages_name_the_option_the_value_and_the_choice(
    name: str, value: Any, message: str
) -> None:
    with pytest.raises(OptionError) as failure:
        OWNERS[name](**{name: value})
    assert str(failure.value) == message


def test_requests_and_settings_share_no_name_and_cannot_be_changed() -> None:
    assert not set(user_options(Settings)) & set(user_options(Request))
    assert set(user_options(Sampling)) < set(user_options(Request))
    with pytest.raises(FrozenInstanceError):
        Request().seed = 1  # type: ignore[misc]


def test_only_declared_options_are_for_users() -> None:
    own = {field.name for owner in (Settings, Request) for field in fields(owner)}
    hidden = {"bank_bytes", "mapped_bytes", "threads", "chunk", "mode"}
    hidden |= {"messages", "tools", "schema", "cancelled", "progress"}
    assert own - set(OPTIONS) == hidden


# -- as people write them -------------------------------------------------------------------------


@given(st.lists(st.sampled_from(FULL_PHASES), min_size=1))
def test_phases_are_written_with_commas(phases: list[str]) -> None:
    parsed = parse("full_experts_in", ",".join(phases))
    assert parsed == tuple(phases)
    assert accepted("full_experts_in", parsed)


@given(st.lists(st.text()))
def test_several_stops_are_written_as_json(stops: list[str]) -> None:
    assert parse("stop", json.dumps(stops)) == stops


@given(st.text())
def test_any_other_stop_is_one_text(stop: str) -> None:
    parsed = parse("stop", stop)
    assert accepted("stop", parsed)
    try:
        written = json.loads(stop)
    except ValueError:
        written = None
    if not isinstance(written, list):
        assert parsed == [stop]


@pytest.mark.parametrize("text", ["[", "[1]", '["a", 2]', "[[]]", '{"a": 1}', '"a"', "null", ""])
def test_json_of_another_kind_is_a_text_to_stop_at(text: str) -> None:
    assert parse("stop", text) == [text]


@given(st.sampled_from(sorted(OPTIONS)), values.filter(lambda value: not isinstance(value, str)))
def test_values_that_are_no_text_need_no_parsing(name: str, value: Any) -> None:
    assert parse(name, value) is value


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"stop", "full_experts_in"}))
def test_texts_of_other_options_stay_as_they_are(name: str) -> None:
    assert parse(name, "a,b") == "a,b"


# -- imports --------------------------------------------------------------------------------------


def test_options_need_no_mlx() -> None:
    script = "import sys; import flash_moe.options; print(*(m for m in sys.modules if 'mlx' in m))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.split() == []
