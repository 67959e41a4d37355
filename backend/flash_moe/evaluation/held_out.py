"""Data that the model has never seen: texts, and dialogues with a right reply.

A folder with `text.jsonl` and `dialogues.jsonl`. All of it is checked when it is read, so that no
evaluation fails after an hour at a line that cannot be judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flash_moe.errors import CheckpointError, OptionError, Remedy
from flash_moe.evaluation.judge import check_check
from flash_moe.format.json_files import parse_lines, read_text
from flash_moe.options import EVALUATION_SECTIONS

Entry = TypeVar("Entry")


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
        """The kinds json and tools are sections of their own; all others are questions."""
        return self.kind if self.kind in EVALUATION_SECTIONS else "questions"


Item = Text | Dialogue


@dataclass(frozen=True, slots=True)
class HeldOut:
    folder: Path
    texts: list[Text]
    dialogues: list[Dialogue]

    @property
    def items(self) -> list[Item]:
        return [*self.texts, *self.dialogues]

    def __len__(self) -> int:
        return len(self.texts) + len(self.dialogues)


def read_held_out(
    folder: Path, sections: Iterable[str] = EVALUATION_SECTIONS, limit: int | None = None
) -> HeldOut:
    """These sections, in the files' order; at most `limit` texts and dialogues of each kind."""
    names = _require_sections(sections)
    if limit is not None and limit < 1:
        raise OptionError(f"limit={limit}: choose 1 or more.")
    texts = _read(folder / "text.jsonl", _text) if "text" in names else []
    dialogues = _read(folder / "dialogues.jsonl", _dialogue) if set(names) - {"text"} else []
    dialogues = [dialogue for dialogue in dialogues if dialogue.section in names]
    held_out = HeldOut(folder, texts[:limit], list(_limited(dialogues, limit)))
    if not len(held_out):
        raise CheckpointError(
            f"{folder} has no data for {', '.join(names)}.", Remedy.EVALUATE_OTHER_DATA
        )
    return held_out


def _require_sections(sections: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(sections))
    if not names or not set(names) <= set(EVALUATION_SECTIONS):
        raise OptionError(f"sections={','.join(names)}: choose {', '.join(EVALUATION_SECTIONS)}.")
    return names


def _limited(dialogues: list[Dialogue], limit: int | None) -> Iterator[Dialogue]:
    seen: Counter[str] = Counter()
    for dialogue in dialogues:
        seen[dialogue.kind] += 1
        if limit is None or seen[dialogue.kind] <= limit:
            yield dialogue


def _read(file: Path, parse: Callable[[Any], Entry]) -> list[Entry]:
    text = read_text(file, Remedy.EVALUATE_OTHER_DATA)
    return parse_lines(file, text, parse, Remedy.EVALUATE_OTHER_DATA)


def _text(value: Any) -> Text:
    return Text(*(_string(value, key) for key in ("source", "name", "text")))


def _dialogue(value: Any) -> Dialogue:
    messages, reply = value["messages"], value["reply"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("messages is not a list of messages")
    if not _is_message(reply) or reply["role"] != "assistant":
        raise ValueError("reply is not a message of the assistant")
    tools, thinking = value.get("tools") or [], value.get("thinking", False)
    if not isinstance(tools, list):
        raise ValueError("tools is not a list")
    if type(thinking) is not bool:
        raise ValueError("thinking is neither true nor false")
    check_check(value["check"])
    return Dialogue(_string(value, "kind"), messages, tools, thinking, value["check"], reply)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _string(value: Any, key: str) -> str:
    if not isinstance(value[key], str):
        raise ValueError(f"{key} is not a string")
    return str(value[key])
