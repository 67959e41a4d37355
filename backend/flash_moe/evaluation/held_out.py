"""What a model is measured on: texts, and dialogues with a right reply, that it never saw.

A folder with `text.jsonl` and `dialogues.jsonl`. Everything is checked when it is read, so that no
measuring of an hour ends at a line that nobody can judge.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flash_moe.errors import CheckpointError, OptionError
from flash_moe.evaluation.judge import check_check

# What is measured apart; every other kind of dialogue is a question.
SECTIONS = ("text", "questions", "json", "tools")

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Text:
    source: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """`messages` end where the assistant is to speak; `reply` is the right message."""

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool
    check: dict[str, Any]
    reply: dict[str, Any]

    @property
    def section(self) -> str:
        return self.kind if self.kind in SECTIONS else "questions"


@dataclass(frozen=True, slots=True)
class HeldOut:
    folder: Path
    texts: list[Text]
    dialogues: list[Dialogue]

    @property
    def items(self) -> list[Text | Dialogue]:
        return [*self.texts, *self.dialogues]

    def __len__(self) -> int:
        return len(self.items)


def read_held_out(
    folder: Path, only: Iterable[str] = SECTIONS, limit: int | None = None
) -> HeldOut:
    """The sections asked for, in the files' order; of texts and of each kind `limit` at most."""
    wanted = dict.fromkeys(only)
    texts = _read(folder / "text.jsonl", _text) if "text" in wanted else []
    dialogues = _read(folder / "dialogues.jsonl", _dialogue) if wanted.keys() - {"text"} else []
    chosen = [dialogue for dialogue in dialogues if dialogue.section in wanted]
    found = HeldOut(folder, texts[:limit], list(_limited(chosen, limit)))
    if not len(found):
        raise CheckpointError(
            f"{folder} holds nothing to measure {', '.join(wanted)} on. Give another folder with "
            "--data, or leave out --only."
        )
    return found


def _limited(dialogues: list[Dialogue], limit: int | None) -> Iterator[Dialogue]:
    seen: Counter[str] = Counter()
    for dialogue in dialogues:
        seen[dialogue.kind] += 1
        if limit is None or seen[dialogue.kind] <= limit:
            yield dialogue


def _read(file: Path, make: Callable[[Any], Item]) -> list[Item]:
    text = read_text(file, "Give a folder with text.jsonl and dialogues.jsonl: --data FOLDER")
    return parse_lines(file, text, make, "Correct the line, or give another folder with --data")


def read_text(file: Path, remedy: str) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}. {remedy}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8: {error.reason}. {remedy}") from error


def parse_lines(file: Path, text: str, make: Callable[[Any], Item], remedy: str) -> list[Item]:
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                items.append(make(json.loads(line)))
            except (OptionError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{file}, line {number}: {_said(error)}. {remedy}") from error
    return items


def _text(value: Any) -> Text:
    return Text(*(_string(value, key) for key in ("source", "name", "text")))


def _dialogue(value: Any) -> Dialogue:
    messages, reply = value["messages"], value["reply"]
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise ValueError("messages are no list of messages")
    if not is_message(reply) or reply["role"] != "assistant":
        raise ValueError("reply is no message of the assistant")
    tools, thinking = value.get("tools") or [], value.get("thinking", False)
    if not isinstance(tools, list) or type(thinking) is not bool:
        raise ValueError("tools are no list, or thinking is neither true nor false")
    check_check(value["check"])
    return Dialogue(_string(value, "kind"), messages, tools, thinking, value["check"], reply)


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _string(value: Any, key: str) -> str:
    if not isinstance(value[key], str):
        raise ValueError(f"{key} is no text")
    return str(value[key])


def _said(error: Exception) -> str:
    missing = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return missing.rstrip(".")
