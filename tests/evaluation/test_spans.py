"""Which tokens are JSON, calls and structure."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.chat.tool_calls import ToolFormat, find_tool_format
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.evaluation.replies import right_reply
from flash_moe.evaluation.spans import inside, marks_of_reply, marks_of_text
from tests.evaluation.data import write_data

TAGS = ToolFormat("qwen3_coder", "<tool_call>", "</tool_call>", lambda text, tools: None)
CALL = "<tool_call>\n<function=f>\n<parameter=x>\na < b, c\n</parameter>\n</function>\n</tool_call>"


def marked(text: str, span: str, section: str, tool_format: ToolFormat | None = None) -> str:
    """`text` with a # for every character inside of a span; each is a token of its own."""
    marks = marks_of_reply(text, [(at, at + 1) for at in range(len(text))], section, tool_format)
    assert inside(marks, "replies").all()
    assert not inside(marks, "texts").any()
    return "".join("#" if yes else "~" for yes in inside(marks, span))


def test_calls_begin_and_end_with_their_format() -> None:
    text = f"Let me see: {CALL}, {CALL}<|im_end|>"
    free = "~" * len("Let me see: ")
    calls = f"{free}{'#' * len(CALL)}~~{'#' * len(CALL)}{'~' * len('<|im_end|>')}"
    assert marked(text, "calls", "tools", TAGS) == calls
    assert marked(text, "calls", "tools") == "~" * len(text)
    assert marked(text, "json", "tools", TAGS) == "~" * len(text)
    # An unfinished call extends to the end; one inside of a thought does not count.
    assert marked(CALL[:30], "calls", "tools", TAGS) == "#" * 30
    assert "#" not in marked(f"{CALL}</think>Yes.", "calls", "tools", TAGS)


def test_the_structure_of_calls() -> None:
    marks = marked(CALL, "structural", "tools", TAGS)
    free = "".join(sign for sign, mark in zip(CALL, marks, strict=True) if mark == "~")
    assert free == "fxa < b c"


def test_the_structure_of_calls_without_tags() -> None:
    other = ToolFormat("mistral", "[TOOL_CALLS]", "", lambda text, tools: None)
    text = 'Well: [TOOL_CALLS]f{"x": 1}'
    marks = marked(text, "structural", "tools", other)
    free = "".join(sign for sign, mark in zip(text, marks, strict=True) if mark == "~")
    assert free == "Well: fx 1"


def test_json_is_the_answer_alone() -> None:
    text = '{"a"</think>\n\n{"n": [1, 2]}<|im_end|>'
    thought = text.index("</think>") + len("</think>")
    assert marked(text, "json", "json") == "~" * thought + "#" * (len(text) - thought)
    structure = marked(text, "structural", "json")
    free = "".join(sign for sign, mark in zip(text, structure, strict=True) if mark == "~")
    assert free == '{"a"</think>n 1 2<|im_end|>'
    assert "#" not in marked(text, "structural", "questions")


@given(st.text('{"a, \n:', max_size=30), st.data())
def test_a_token_is_structural_if_a_character_of_it_is(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    offsets = list(itertools.pairwise(cuts))
    marks = marks_of_reply(text, offsets, "json", None)
    structural = [any(sign in '"{:,\n' for sign in text[a:b]) for a, b in offsets]
    assert inside(marks, "structural").tolist() == structural


def test_spans_in_the_tokens_of_a_model(demo_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder)
    tool_format = find_tool_format(demo_folder, tokenizer)
    texts: dict[str, list[str]] = {"json": [], "calls": []}
    for dialogue in read_held_out(write_data(tmp_path / "data"), ["json", "tools"]).dialogues:
        right = right_reply(tokenizer, dialogue)
        assert len(right.offsets) == len(right.reply)
        marks = marks_of_reply(right.text, right.offsets, dialogue.section, tool_format)
        for span, parts in texts.items():
            ids = [t for t, yes in zip(right.reply, inside(marks, span), strict=True) if yes]
            parts.append(tokenizer.tokenizer.decode(ids, skip_special_tokens=False))
    assert texts["json"] == ['{"n": 3}<|im_end|>', "", ""]
    assert texts["calls"][1].startswith("<tool_call>\n<function=weather>")
    assert texts["calls"][1].endswith("</function>\n</tool_call>")
    assert (texts["calls"][0], texts["calls"][2]) == ("", "")


def test_texts() -> None:
    assert inside(marks_of_text(3), "texts").all()
    assert not inside(marks_of_text(3), "replies").any()
    assert marks_of_text(0).dtype == np.uint8
