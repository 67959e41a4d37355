"""Texts and dialogues as the token ids that a model is to predict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.evaluation.held_out import Dialogue, Item, Text
from flash_moe.evaluation.replies import right_reply
from flash_moe.evaluation.spans import SpanMarks, marks_of_reply, marks_of_text


@dataclass(frozen=True, slots=True)
class Document:
    """Of every piece the ids from `first` (1 or more) on are predicted, each from all before it in
    the piece. `nbytes` is what the predicted tokens of a text stand for; `key` identifies the ids
    in references."""

    item: Item
    key: str
    pieces: Sequence[Sequence[int]]
    first: int
    marks: SpanMarks
    nbytes: int = 0

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(len(piece) - self.first for piece in self.pieces)

    @property
    def computed(self) -> int:
        """How many go through the model: of every piece all but the last."""
        return sum(len(piece) - 1 for piece in self.pieces)


def make_document(
    tokenizer: ChatTokenizer, item: Item, tool_format: ToolFormat | None, window: int
) -> Document:
    """OptionError, if the model's template cannot render a dialogue."""
    if isinstance(item, Text):
        return _of_text(tokenizer, item, window)
    return _of_reply(tokenizer, item, tool_format)


def key_of(ids: Sequence[int], first: int, window: int | None = None) -> str:
    """`ids[first:]` are predicted, within windows of a text."""
    return digest([list(ids), first, window])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _of_text(tokenizer: ChatTokenizer, text: Text, window: int) -> Document:
    """All of a text but its first token, which nothing leads to.

    Windows share one token: the last of one is where the next begins, so none is left out.
    """
    encoded = tokenizer.tokenizer.encode(text.text)
    ids: list[int] = encoded.ids
    starts = range(0, len(ids) - 1, window)
    return Document(
        text,
        key_of(ids, 1, window),
        [ids[start : start + window + 1] for start in starts],
        1,
        marks_of_text(max(len(ids) - 1, 0)),
        len(text.text[encoded.offsets[1][0] :].encode()) if starts else 0,
    )


def _of_reply(
    tokenizer: ChatTokenizer, dialogue: Dialogue, tool_format: ToolFormat | None
) -> Document:
    right = right_reply(tokenizer, dialogue)
    ids, first = [*right.prompt, *right.reply], len(right.prompt)
    marks = marks_of_reply(right.text, right.offsets, dialogue.section, tool_format)
    return Document(dialogue, key_of(ids, first), [ids], first, marks)
