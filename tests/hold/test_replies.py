"""A reply of a model that is held is the one that it gives here: every event, every figure but
times and memory. And nobody, whatever is said, disturbs the next."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe import BUILT_IN, Engine, hold
from flash_moe.chat.event import Event
from flash_moe.decode.statistics import Stats
from flash_moe.errors import HolderGone, OptionError, Remedy
from flash_moe.hold import protocol
from flash_moe.hold.loading import Loading
from flash_moe.hold.places import Place
from flash_moe.hold.session import BREATH_SECONDS
from flash_moe.options import Request
from tests.conftest import runtime
from tests.hold.processes import PATIENCE, eventually, found, idle, reply, said, speaking, start

# Counted, and not measured; what was restored depends on what was asked before.
SAME = (
    *("prompt_tokens", "generated_tokens", "reasoning_tokens", "finish_reason", "runtime", "bits"),
    *("experts_per_token", "constrained_tokens", "forced_tokens", "warning"),
)
MULTIPLY = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
QUESTIONS = (
    "What does os.path.join do?",
    "What is 1234 * 5678?",
    "What is 468 + 357?",
    "Ada Lovelace is 36 and lives in London.",
    "Füße, 東京 🙂?",
)
requests = st.builds(
    Request,
    messages=st.sampled_from(QUESTIONS).map(lambda text: [{"role": "user", "content": text}]),
    tools=st.sampled_from([(), (), [MULTIPLY]]),
    schema=st.sampled_from([None, None, PERSON]),
    max_tokens=st.integers(1, 40),
    temperature=st.none() | st.floats(0.1, 2),
    seed=st.integers(0, 9),
    top_p=st.none() | st.floats(0.1, 1),
    repetition_penalty=st.none() | st.just(1.2),
    stop=st.none() | st.sampled_from([["="], ["os", "I"]]),
    thinking=st.none() | st.booleans(),
    thinking_budget=st.none() | st.integers(0, 20),
    logprobs=st.none() | st.integers(0, 3),
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Loading]]:
    """One process for all tests of this file, and the folder where it is found."""
    with pytest.MonkeyPatch.context() as patch, runtime() as folder:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        prompts = tmp_path_factory.mktemp("held") / "prompts"
        loading = Loading(BUILT_IN["flash-moe-tiny"], prompts=prompts)
        start(loading)
        yield folder, loading


@pytest.fixture
def held(kept: tuple[Path, Loading], monkeypatch: pytest.MonkeyPatch) -> Loading:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(kept[0]))
    return kept[1]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.load(BUILT_IN["flash-moe-tiny"])
    yield engine
    engine.close()


def figures(stats: Stats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in SAME}


@given(request=requests)
@settings(max_examples=10)
def test_it_is_the_same(kept: tuple[Path, Loading], engine: Engine, request: Request) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(kept[0]))
        with closing(found(kept[1])) as model:
            there = model.reply(request)
            events = list(there.events())
    here = engine.reply(request)
    assert events == list(here.events())
    assert figures(there.stats) == figures(here.stats)
    assert there.complete == here.complete
    if request.logprobs is not None:
        assert there.logprobs() == here.logprobs()
    assert (model.plan.architecture, model.plan.bits) == (engine.plan.architecture, "4-bit")
    assert model.lossy == engine.lossy == []


@pytest.mark.parametrize(
    ("question", "options", "kinds"),
    [
        ("What is 468 + 357?", {"thinking": True}, {"reasoning", "text"}),
        ("What is 1234 * 5678?", {"tools": [MULTIPLY]}, {"call_name", "call"}),
        ("Ada Lovelace is 36.", {"schema": PERSON}, {"text"}),
    ],
)
def test_thoughts_calls_and_json_come_through(
    held: Loading, question: str, options: dict[str, Any], kinds: set[str]
) -> None:
    request = Request(messages=[{"role": "user", "content": question}], **options)
    events, answer = reply(held, request)
    assert {event.kind for event in events} == kinds
    assert answer.complete
    text = "".join(event.text for event in events if event.kind == "text")
    if "schema" in options:
        assert json.loads(text) == {"name": "Ada Lovelace", "age": 36}
    if "tools" in options:
        assert events[-1].call == {"name": "multiply", "arguments": {"x": 1234, "y": 5678}}
    with closing(found(held)) as model:
        assert "".join(model.reply(request)) == text


def test_an_error_of_the_engine_is_its_own(held: Loading, engine: Engine) -> None:
    request = Request(messages=[{"role": "user", "content": "Hello " * 40}], context_length=5)
    with pytest.raises(OptionError) as here:
        engine.reply(request)
    with pytest.raises(OptionError) as there:
        reply(held, request)
    assert str(there.value) == str(here.value)
    assert there.value.remedy is Remedy.SHORTEN_CONVERSATION
    assert reply(held, hello())[0]


def hello(**options: Any) -> Request:
    return Request(messages=[{"role": "user", "content": "Hello"}], **options)


def long() -> Request:
    """It would take minutes: at this temperature, the model never ends."""
    return hello(max_tokens=100_000, temperature=10.0, seed=1)


def test_prompts_are_read_once_by_all(held: Loading) -> None:
    request = hello(max_tokens=1)
    system = {"role": "system", "content": "Answer in upper case. " * 20}
    request = Request(messages=[system, *request.messages], max_tokens=1)
    assert reply(held, request)[1].stats.cached_tokens == 0
    assert reply(held, request)[1].stats.cached_tokens > 80


def test_progress_of_a_prompt_is_heard(held: Loading) -> None:
    heard: list[tuple[int, int]] = []
    text = " ".join(f"Item {n} is in box {n * 7 % 90}." for n in range(250))
    message = {"role": "user", "content": text}
    request = Request(messages=[message], max_tokens=1, progress=lambda *done: heard.append(done))
    _, answer = reply(held, request)
    if answer.stats.seconds_to_first_token > 4 * BREATH_SECONDS:
        assert heard
    assert all(0 <= done <= total <= answer.stats.prompt_tokens for done, total in heard)


def test_cancelling_ends_it_with_its_figures(held: Loading) -> None:
    cancelled = threading.Event()
    request = Request(
        messages=long().messages,
        max_tokens=100_000,
        temperature=10.0,
        logprobs=0,
        cancelled=cancelled.is_set,
    )
    with closing(found(held)) as model:
        answer = model.reply(request)
        for count, _ in enumerate(answer.events(), 1):
            if count == 5:
                cancelled.set()
    assert answer.stats.finish_reason == "cancelled"
    assert 5 <= answer.stats.generated_tokens < 1000
    assert len(answer.logprobs()) == answer.stats.generated_tokens
    assert eventually(lambda: idle(held))


def test_who_leaves_stops_it(held: Loading) -> None:
    """By closing the iterator, and by the end of the connection."""
    with closing(found(held)) as model:
        answer = model.reply(long())
        events = answer.events()
        assert [next(events) for _ in range(3)]
        events.close()
    assert eventually(lambda: idle(held))
    assert 3 <= answer.stats.generated_tokens < 1000
    model = found(held)
    unfinished = model.reply(long()).events()
    assert next(unfinished)
    model.close()
    assert eventually(lambda: idle(held))
    assert reply(held, hello())[0]


def test_nothing_is_computed_before_it_is_asked_for(held: Loading) -> None:
    with closing(found(held)) as model:
        answer = model.reply(long())
        events = answer.events()
        next(events)
        # Meanwhile many others have their replies in full.
        for _ in range(3):
            assert reply(held, hello())[1].stats.finish_reason == "stop"
        events.close()
    assert answer.stats.generated_tokens < 10


def test_replies_side_by_side_do_not_mix(held: Loading) -> None:
    def request(number: int) -> Request:
        text = f"What is {number} + 3?"
        return Request(messages=[{"role": "user", "content": text}])

    texts: dict[int, str] = {}

    def read(number: int) -> None:
        with closing(found(held)) as model:
            texts[number] = "".join(model.reply(request(number)))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert texts == {n: f"{n} + 3 = {n + 3}." for n in range(2, 10)}


def test_two_in_one_thread(held: Loading) -> None:
    with closing(found(held)) as one, closing(found(held)) as other:
        pairs = zip(one.reply(hello()), other.reply(hello()), strict=True)
        assert all(first == second for first, second in pairs)


# What others say to it -------------------------------------------------------------------------

frames = st.sampled_from(
    [
        {"next": True},
        {"cancel": True},
        {"ready": True},
        {"request": {}},
        {"request": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}},
        {"request": {"messages": [{"role": "nobody"}]}},
        {"request": {"messages": [{"role": "user", "content": {"deep": []}}], "tools": [{}]}},
        {"request": {"messages": [{"role": "user", "content": "x"}], "schema": {"type": "x"}}},
        {"ready": True, "keep": -1},
        {"ready": True, "keep": "long"},
        {"request": 3},
        {"hello": "again"},
        {},
    ]
)
garbage = st.binary(max_size=40) | frames.map(protocol.pack)
lies = st.sampled_from([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x00\x00\x00\x05{}"])


@given(spoken=st.lists(garbage | lies, max_size=6), greeted=st.booleans())
@settings(max_examples=60)
def test_garbage_disturbs_nobody(
    kept: tuple[Path, Loading], spoken: list[bytes], greeted: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(kept[0]))
        identity = kept[1].identity()
        greeting = [{"hello": identity}] if greeted else []
        with speaking(Place.of(identity), *greeting, *spoken) as peer:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_WR)  # nothing more will be said
            answered = said(peer)
        assert all(answer.keys() <= SAID for answer in answered)
        assert all("Traceback" not in str(answer) for answer in answered)


SAID = {"hello", "alive", "begin", "event", "end", "error"}


def test_it_has_lived_through_that(held: Loading) -> None:
    before = idle(held)
    assert reply(held, hello())[0] == [*reply(held, hello())[0]]
    assert eventually(lambda: idle(held)).pid == (before and before.pid)


def test_another_version_is_not_spoken_to(held: Loading) -> None:
    """One that lies about its name, too: it is told ours, and nothing else."""
    identity = held.identity()
    with speaking(Place.of(identity), {"hello": identity[:16] + "0" * 48}) as peer:
        assert said(peer) == [{"hello": identity}]


def test_a_reply_that_is_too_long_to_ask_for_is_an_error(held: Loading) -> None:
    text = "x" * (protocol.MOST_BYTES + 1)
    with closing(found(held)) as model, pytest.raises(HolderGone):
        list(model.reply(Request(messages=[{"role": "user", "content": text}])).events())


def test_events_are_the_engine_s(held: Loading) -> None:
    events, _ = reply(held, hello())
    assert all(isinstance(event, Event) for event in events)
    assert hold.holders()[0].resident_bytes
