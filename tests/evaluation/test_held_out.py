"""Held-out data is read section by section, and checked before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flash_moe.errors import CheckpointError, OptionError, Remedy
from flash_moe.evaluation.held_out import read_held_out
from tests.evaluation.data import DIALOGUES


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "dialogues.jsonl, line 2"),
        ({"check": {"calls": 3}}, "is not a check"),
        ({"check": {"json": 1, "schema": {"oneOf": []}}}, "uses 'oneOf'"),
        ({"messages": []}, "messages is not a list"),
        ({"reply": {"role": "user"}}, "not a message of the assistant"),
        ({"thinking": "yes"}, "thinking is neither"),
        ({"tools": "yes"}, "tools is not a list"),
        ({"kind": 3}, "kind is not a string"),
    ],
)
def test_lines_that_cannot_be_judged(line: Any, message: str, tmp_path: Path) -> None:
    second = line if isinstance(line, str) else json.dumps({**DIALOGUES[0], **line})
    lines = f"{json.dumps(DIALOGUES[0])}\n{second}\n"
    (tmp_path / "dialogues.jsonl").write_text(lines)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_held_out(tmp_path, ["json"])
    assert caught.value.remedy is Remedy.EVALUATE_OTHER_DATA


def test_folders_without_data(tmp_path: Path) -> None:
    (tmp_path / "dialogues.jsonl").write_text(json.dumps(DIALOGUES[0]))
    for section, message in (("text", "Cannot read .*text.jsonl"), ("tools", "no data for tools")):
        with pytest.raises(CheckpointError, match=message) as caught:
            read_held_out(tmp_path, [section])
        assert caught.value.remedy is Remedy.EVALUATE_OTHER_DATA


def test_limits_and_sections(data: Path) -> None:
    held_out = read_held_out(data, limit=1)
    assert (len(held_out.texts), [d.kind for d in held_out.dialogues]) == (
        1,
        ["sums", "talk", "json", "tools"],
    )
    assert len(held_out) == len(held_out.items) == 5
    assert [d.kind for d in read_held_out(data, ["json"]).dialogues] == ["json"]


def test_sections_and_limits_that_do_not_exist(data: Path) -> None:
    for sections in (["jason"], [], "text"):
        with pytest.raises(OptionError, match="choose text, questions, json, tools"):
            read_held_out(data, sections)
    with pytest.raises(OptionError, match="limit=0: choose 1 or more"):
        read_held_out(data, limit=0)
