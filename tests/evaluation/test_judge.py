"""Whether a reply is right. Calls go through the demo's own template and mlx-lm's parser."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.chat.tool_calls import ToolFormat, find_tool_format
from flash_moe.errors import FlashMoeError, OptionError
from flash_moe.evaluation.judge import answer, check_check, judge, parse_json
from tests.evaluation.data import CALL, SCHEMA, TOOL
from tests.strategies import json_values

CHECK = {"json": {"n": 3}, "schema": SCHEMA}
WRITTEN = (
    "<tool_call>\n<function=weather>\n<parameter=place>\nBonn\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)


@pytest.fixture(scope="module")
def tool_format(demo_folder: Path) -> ToolFormat:
    tool_format = find_tool_format(demo_folder, load_tokenizer(demo_folder))
    assert tool_format is not None
    assert tool_format.name == "qwen3_coder"
    return tool_format


@pytest.mark.parametrize(
    ("text", "check", "right"),
    [
        ("  Four\n and  more ", {"equals": "four and more"}, True),
        ("Four.", {"equals": "four"}, False),
        ("It is FOUR or five", {"contains": ["four", "Five"]}, True),
        ("It is four", {"contains": ["four", "five"]}, False),
        ("anything", {"contains": []}, True),
    ],
)
def test_texts(text: str, check: dict[str, Any], right: bool) -> None:
    assert judge(text, check, [], None) == {"right": right}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('\n{"n": 3.0}\n', (True, True, True)),
        ('{"n": 4}', (True, True, False)),
        ('{"n": "3"}', (True, False, False)),
        ('{"n": 3, "m": 1}', (True, False, False)),
        ('```json\n{"n": 3}\n```', (False, False, False)),
        ('{"n": NaN}', (False, False, False)),
        ('{"n": 3} and more', (False, False, False)),
        ("", (False, False, False)),
        ("[" * 100_000, (False, False, False)),
    ],
)
def test_json(text: str, verdict: tuple[bool, bool, bool]) -> None:
    assert tuple(judge(text, CHECK, [], None).values()) == verdict


@pytest.mark.parametrize(
    ("text", "expected", "verdict"),
    [
        (WRITTEN, [CALL], (True, True, True)),
        (f"I look.\n\n{WRITTEN}", [CALL], (True, True, True)),
        (WRITTEN.replace("Bonn", "Köln"), [CALL], (True, True, False)),
        (WRITTEN.replace("=weather", "=whether"), [CALL], (True, False, False)),
        (WRITTEN.replace("\n2\n", "\ntwo\n"), [CALL], (False, False, False)),
        (WRITTEN[:-1], [CALL], (False, False, False)),
        (WRITTEN.replace("</function>", ""), [CALL], (False, False, False)),
        ("It is sunny.", [CALL], (False, False, False)),
        (f"{WRITTEN}\n{WRITTEN}", [CALL], (True, False, False)),
        (f"{WRITTEN}\n{WRITTEN}", [CALL, CALL], (True, True, True)),
        ("At any time.", [], (True, True, True)),
        (WRITTEN, [], (True, False, False)),
    ],
)
def test_calls(
    text: str, expected: list[Any], verdict: tuple[bool, bool, bool], tool_format: ToolFormat
) -> None:
    assert tuple(judge(text, {"calls": expected}, [TOOL], tool_format).values()) == verdict


def test_calls_of_a_model_without_a_tool_format() -> None:
    assert not any(judge(WRITTEN, {"calls": [CALL]}, [TOOL], None).values())


places = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and "<" not in text and text.lower() != "null"
)


@given(st.lists(st.tuples(places, st.integers(-9, 99)), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_what_the_template_writes_is_right(
    demo_folder: Path, tool_format: ToolFormat, stays: list[tuple[str, int]]
) -> None:
    template = load_tokenizer(demo_folder).template
    assert template is not None
    calls = [
        {"name": "weather", "arguments": {"place": place, "days": days}} for place, days in stays
    ]
    reply = {"role": "assistant", "content": "", "tool_calls": [{"function": c} for c in calls]}
    asked = [{"role": "user", "content": "?"}]
    start = template.render(asked, tools=[TOOL], enable_thinking=False)
    conversation = template.render(
        [*asked, reply], tools=[TOOL], enable_thinking=False, add_generation_prompt=False
    )
    text = answer(conversation.removeprefix(start), start)
    # In any order.
    assert all(judge(text, {"calls": calls[::-1]}, [TOOL], tool_format).values())


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("…<think>\n", "Hm.\n</think>\n\nFour", "\n\nFour"),
        ("…<think>\n", "Hm, still thinking", ""),
        ("…<think>\n\n</think>\n\n", "Four", "Four"),
        ("…<think>\n\n</think>\n\n", "Four <think> or", ""),
        ("…", "<think>Hm.</think>Four", "Four"),
        ("…", "Four", "Four"),
    ],
)
def test_thoughts_are_not_part_of_the_answer(prompt: str, text: str, expected: str) -> None:
    assert answer(text, prompt) == expected


@pytest.mark.parametrize(
    "check",
    [
        None,
        {},
        {"equals": "x", "contains": []},
        {"equals": 3},
        {"contains": "x"},
        {"json": 3},
        {"json": 3, "schema": {"pattern": "x"}},
        {"calls": [{"name": "x"}]},
    ],
)
def test_malformed_checks(check: Any) -> None:
    with pytest.raises(OptionError):
        check_check(check)


@given(json_values)
def test_every_json_value_is_read(value: Any) -> None:
    try:
        written = json.dumps(value, allow_nan=False)
    except ValueError:  # NaN, which Python writes and JSON does not have
        with pytest.raises(ValueError, match="is not JSON"):
            parse_json(json.dumps(value))
    else:
        assert parse_json(f"\n{written} ") == value


pieces = st.sampled_from(
    [*("[", "{", '"', "]", "}", ":", ",", "1e999", "[" * 900, "]" * 900, "\n", "{1, 2}"),
     *("<tool_call>", "</tool_call>", "<function=", "</function>", "weather>", "<parameter="),
     *("place>", "other>", "days>", "</parameter>", "null", "٣", "{(1,): 2, 'x': 3}")]
)  # fmt: skip


@given(st.lists(pieces | st.text(max_size=3), max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_every_reply_can_be_judged(tool_format: ToolFormat, text: str) -> None:
    loose: Any = copy.deepcopy(TOOL)
    loose["function"]["parameters"]["properties"]["other"] = {"type": "any"}
    for check in (CHECK, {"calls": [CALL]}, {"equals": "x"}):
        judge(answer(text, ""), check, [loose], tool_format)


def test_arguments_that_are_not_json(tool_format: ToolFormat) -> None:
    tool = {"function": {"name": "f", "parameters": {"properties": {"x": {"type": "any"}}}}}
    for value in ("{1, 2}", "{(1,): 2, 'x': 3}", "b'x'"):
        written = f"<tool_call><function=f><parameter=x>{value}</parameter></function></tool_call>"
        assert tool_format.calls(written, [tool]) is None, value


def test_a_format_that_mlx_lm_does_not_have(demo_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder)
    for name, message in (("no_such_one", "no parser 'no_such_one'"), ("a.b", "is not a name")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tool_parser_type": name}))
        with pytest.raises(FlashMoeError, match=message):
            find_tool_format(tmp_path, tokenizer)
    (tmp_path / "tokenizer_config.json").write_text('{"tool_parser_type": "json_tools"}')
    tool_format = find_tool_format(tmp_path, tokenizer)
    assert tool_format is not None
    written = f"<tool_call>{json.dumps(CALL)}</tool_call>"
    assert tool_format.calls(written, [TOOL]) == [CALL]
    assert tool_format.calls("<tool_call>[1]</tool_call>", [TOOL]) is None
