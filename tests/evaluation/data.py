"""A few held-out texts and dialogues of every kind, as a folder that evaluations read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
CALL = {"name": "weather", "arguments": {"place": "Bonn", "days": 2}}
TEXTS = [
    {"source": "prose", "name": "a", "text": "The router picks some experts. " * 9},
    {"source": "prose", "name": "b", "text": "Größe ist nicht alles, näher besehen. " * 4},
    {"source": "code", "name": "c", "text": "def f(x):\n    return x + 1\n\n\n" * 6},
]


def _assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _dialogue(kind: str, ask: str, reply: Any, check: Any, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": ask}]
    return {"kind": kind, "messages": messages, "tools": [], "thinking": False, "check": check} | {
        "reply": reply,
        **more,
    }


DIALOGUES = [
    _dialogue("sums", "1 + 1?", _assistant("2"), {"equals": "2"}),
    _dialogue(
        "sums",
        "2 + 2?",
        _assistant("4", reasoning_content="Two and two."),
        {"equals": "4"},
        thinking=True,
    ),
    _dialogue("talk", "Hello!", _assistant("Hello to you."), {"contains": ["hello"]}),
    _dialogue("json", "n is 3", _assistant('{"n": 3}'), {"json": {"n": 3}, "schema": SCHEMA}),
    _dialogue(
        "tools",
        "Weather in Bonn for 2 days?",
        _assistant("", tool_calls=[{"type": "function", "function": CALL}]),
        {"calls": [CALL]},
        tools=[TOOL],
    ),
    _dialogue("tools", "Thank you!", _assistant("At any time."), {"calls": []}, tools=[TOOL]),
]


def write_data(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, items in (("text", TEXTS), ("dialogues", DIALOGUES)):
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return folder
