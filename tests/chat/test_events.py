"""A reply gives the same thoughts, answer and calls wherever it is cut, and loses nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools, qwen3_coder

from flash_moe.chat.event import Event
from flash_moe.chat.events import Markers, Splitter
from flash_moe.chat.tool_calls import ToolFormat

THOUGHT = ("<think>", "</think>")
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            },
        },
    }
]
FORMATS = {
    name: ToolFormat(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call)
    for name, module in (("qwen3_coder", qwen3_coder), ("json_tools", json_tools))
}
QWEN_CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\ntwo\n"
    "</parameter>\n</function>\n</tool_call>"
)
JSON_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "two"}}\n</tool_call>'
CALLS = {"qwen3_coder": QWEN_CALL, "json_tools": JSON_CALL}
formats = pytest.mark.parametrize("tool_format", FORMATS)


def split(text: str, cuts: list[int], markers: Markers, thinking: bool) -> list[Event]:
    """Events, with neighbouring pieces of text joined: where they were cut does not matter."""
    splitter = Splitter(markers, thinking)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    events = [
        event for a, b in pairwise(places) for event in splitter.feed(text[a:b])
    ] + splitter.finish()
    joined: list[Event] = []
    for event in events:
        if joined and event.kind == joined[-1].kind and event.kind in ("text", "reasoning"):
            event = Event(event.kind, joined.pop().text + event.text)
        joined.append(event)
    return joined


cuts = st.lists(st.integers(0, 1000), max_size=30)
# With the characters of the markers, so that parts of them occur.
words = st.text(alphabet='ab <>/\n"tool_callthinkfunction=', max_size=60)


@given(words, cuts)
def test_text_of_a_model_without_markers_is_not_changed(text: str, cuts: list[int]) -> None:
    events = split(text, cuts, Markers(), False)
    assert events == ([Event("text", text)] if text else [])


@formats
@given(words, cuts, st.booleans())
def test_cuts_change_nothing(tool_format: str, text: str, cuts: list[int], thinking: bool) -> None:
    markers = Markers(THOUGHT, FORMATS[tool_format], TOOLS)
    text = text.replace("call>", CALLS[tool_format])
    assert split(text, cuts, markers, thinking) == split(text, [], markers, thinking)


@formats
@given(words, cuts, st.booleans())
def test_nothing_but_markers_calls_and_white_space_is_lost(
    tool_format: str, text: str, cuts: list[int], thinking: bool
) -> None:
    markers = Markers(THOUGHT, FORMATS[tool_format], TOOLS)
    events = split(text, cuts, markers, thinking)
    shown = "".join(e.text for e in events if e.kind in ("text", "reasoning"))

    def bare(text: str) -> str:
        for marker in THOUGHT:
            text = text.replace(marker, "")
        return "".join(text.split())

    # A call that cannot be parsed is shown as it was written.
    if not any(event.kind == "call" for event in events):
        assert bare(shown) == bare(text)


@formats
@given(cuts)
def test_thought_answer_and_calls_are_told_apart(tool_format: str, cuts: list[int]) -> None:
    markers = Markers(THOUGHT, FORMATS[tool_format], TOOLS)
    call = {"name": "add", "arguments": {"a": 1, "b": "two"}}
    text = f"\nLook it up.\n</think>\n\nI will.\n\n{CALLS[tool_format]}\n{CALLS[tool_format]}\n"
    assert split(text, cuts, markers, True) == [
        Event("reasoning", "Look it up."),
        Event("text", "I will."),
        Event("call_name", "add", 0),
        Event("call", index=0, call=call),
        Event("call_name", "add", 1),
        Event("call", index=1, call=call),
    ]


@given(cuts)
def test_a_model_may_open_its_thought_itself(cuts: list[int]) -> None:
    markers = Markers(THOUGHT)
    text = "\n<think>\nWell.</think>\n\nYes, <think> is a tag.\n"
    assert split(text, cuts, markers, False) == [
        Event("reasoning", "Well."),
        Event("text", "Yes, <think> is a tag.\n"),
    ]


def test_a_name_comes_before_its_arguments() -> None:
    splitter = Splitter(Markers(THOUGHT, FORMATS["qwen3_coder"], TOOLS), False)
    assert splitter.feed("<tool_call>\n<function=add") == []
    assert splitter.feed(">\n<parameter=a>\n") == [Event("call_name", "add", 0)]


def test_a_key_called_name_is_not_the_name_of_a_function() -> None:
    markers = Markers(THOUGHT, FORMATS["json_tools"], TOOLS)
    text = '<tool_call>{"arguments": {"name": "x"}, "name": "add"}</tool_call>'
    named = [event.text for event in split(text, [], markers, False) if event.kind == "call_name"]
    assert named == ["add"]


@formats
@pytest.mark.parametrize("broken", ["<tool_call>\nwhat?\n</tool_call>", "<tool_call>\n<function=a"])
def test_a_malformed_call_is_shown_as_text(tool_format: str, broken: str) -> None:
    markers = Markers(THOUGHT, FORMATS[tool_format], TOOLS)
    events = split(broken, [], markers, False)
    assert "".join(event.text for event in events if event.kind == "text") == broken


def test_without_tools_nothing_is_a_call() -> None:
    assert split(QWEN_CALL, [], Markers(THOUGHT), False) == [Event("text", QWEN_CALL)]
