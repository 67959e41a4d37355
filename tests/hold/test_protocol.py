"""What goes through the socket comes out equal, and nothing else comes out at all."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe import errors
from flash_moe.chat.event import Event
from flash_moe.decode.statistics import Stats
from flash_moe.errors import CheckpointError, FlashMoeError, OptionError, Remedy
from flash_moe.hold import protocol
from flash_moe.hold.places import printable
from flash_moe.hold.protocol import Malformed
from flash_moe.options import Request

# Surrogates, too: they come from bytes that are not UTF-8, on a command line.
texts = st.text(st.characters(exclude_categories=()), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(texts, inside, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, values, max_size=3)
requests = st.builds(
    Request,
    messages=st.lists(objects, max_size=3),
    tools=st.just(()) | st.lists(objects, min_size=1, max_size=2),
    schema=st.none() | objects,
    temperature=st.none() | st.floats(0, 10) | st.integers(0, 10),
    top_k=st.none() | st.integers(0, 50),
    seed=st.none() | st.integers(0, 2**63 - 1),
    max_tokens=st.none() | st.integers(1),
    stop=st.none() | st.lists(texts, max_size=3),
    thinking=st.none() | st.booleans(),
    save_prompts=st.none() | st.booleans(),
    logprobs=st.none() | st.integers(0, 9),
)
calls = st.fixed_dictionaries({"name": texts, "arguments": objects})
events = st.one_of(
    st.builds(Event, st.sampled_from(["text", "reasoning"]), texts),
    st.builds(Event, st.just("call_name"), texts, st.integers(0, 9)),
    st.builds(Event, st.just("call"), index=st.integers(0, 9), call=calls),
)
kinds = [one for one in vars(errors).values() if isinstance(one, type)]
engine_errors = st.builds(
    lambda kind, *rest: kind(*rest),
    st.sampled_from([kind for kind in kinds if issubclass(kind, FlashMoeError)]),
    texts,
    st.none() | st.sampled_from(Remedy),
    st.none() | texts.filter(lambda text: "\0" not in text).map(Path),
)


def through(value: Any) -> Any:
    """As the other side gets it."""
    packed = protocol.pack({"value": value})
    head = protocol.LENGTH.size
    assert protocol.length(packed[:head]) == len(packed) - head
    return protocol.unpack(packed[head:])["value"]


@given(requests)
def test_a_request_arrives(request: Request) -> None:
    assert protocol.request_from_json(through(protocol.request_to_json(request))) == request


def test_no_field_of_a_request_is_forgotten() -> None:
    """Every one that is set is sent, but what is called here."""
    given = Request(
        messages=[{}],
        tools=[{}],
        schema={},
        stop=["a"],
        temperature=0.5,
        thinking=False,
        save_prompts=True,
    )
    sent = protocol.request_to_json(given)
    unset = {one.name for one in fields(Request) if getattr(given, one.name) in (None, ())}
    assert {one.name for one in fields(Request)} == {*sent, *unset, *protocol.CALLBACKS}


@given(events)
def test_an_event_arrives(event: Event) -> None:
    assert protocol.event_from_json(through(protocol.event_to_json(event))) == event


@given(st.floats(allow_nan=False), st.text(), st.none() | st.floats(0, 1), st.integers())
def test_statistics_arrive(seconds: float, runtime: str, rate: float | None, count: int) -> None:
    stats = Stats(load_seconds=seconds, runtime=runtime, hit_rate=rate, expert_bytes=count)
    frame = through(protocol.end_frame(stats, True))
    assert asdict(protocol.stats_from_json(frame["end"]["stats"])) == asdict(stats)


@given(engine_errors)
def test_an_error_arrives(error: FlashMoeError) -> None:
    arrived = protocol.error_from_json(through(protocol.error_to_json(error)))
    assert type(arrived) is type(error)
    assert (arrived.remedy, arrived.path) == (error.remedy, error.path)
    # But for what a terminal would take for a command.
    assert str(arrived).split("\n") == [printable(line) for line in str(error).split("\n")]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory."),
        (KeyError("x"), "The process that holds the model failed: KeyError: 'x'."),
    ],
)
def test_other_errors_are_told(error: Exception, text: str) -> None:
    arrived = protocol.error_from_json(through(protocol.error_to_json(error)))
    assert type(arrived) is FlashMoeError
    assert str(arrived) == text


def test_an_error_makes_no_other_object() -> None:
    for kind in ("Path", "Remedy", "__builtins__", "Exception", "nothing"):
        assert type(protocol.error_from_json({"kind": kind, "text": "x"})) is FlashMoeError


READERS = (
    protocol.request_from_json,
    protocol.event_from_json,
    protocol.stats_from_json,
    protocol.error_from_json,
    protocol.seconds_from_json,
)


@given(st.sampled_from(READERS), values)
def test_what_nobody_says_is_malformed(read: Any, value: Any) -> None:
    with suppress(Malformed, OptionError):
        read(value)


@given(st.binary(max_size=60))
def test_bytes_are_an_object_or_malformed(body: bytes) -> None:
    try:
        frame = protocol.unpack(body)
    except Malformed:
        return
    assert isinstance(frame, dict)
    assert json.loads(body) == frame


def test_deep_and_long_frames_are_malformed() -> None:
    with pytest.raises(Malformed):
        protocol.unpack(b"[" * 200_000)
    with pytest.raises(Malformed):
        protocol.length(protocol.LENGTH.pack(protocol.MOST_BYTES + 1))
    with pytest.raises(Malformed):
        protocol.length(protocol.LENGTH.pack(5000), protocol.FEW_BYTES)
    with pytest.raises(Malformed):
        protocol.pack({"text": "x" * protocol.MOST_BYTES})
    with pytest.raises(Malformed):
        protocol.pack({"value": {1, 2}})


@pytest.mark.parametrize(
    "request_",
    [
        [],
        {"cancelled": True},
        {"progress": 1},
        {"other": 1},
        {"messages": "text"},
        {"messages": [1]},
        {"tools": {}},
        {"schema": []},
        {"stop": 3},
        {"temperature": "hot"},
        {"max_tokens": 0},
    ],
)
def test_requests_that_nobody_makes(request_: Any) -> None:
    with pytest.raises((Malformed, CheckpointError, OptionError)):
        protocol.request_from_json(request_)
