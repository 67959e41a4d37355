"""Which tokens of what is foreseen have to be exact: JSON, calls, and what holds them together.

texts        all of the texts
replies      all of the right replies
json         right replies of the section json, without their thoughts
calls        calls in right replies, from the first character of their format to the last
structural   of json and calls: tokens with one of "{}[]:, or a line break in them, or with a
             part of what a call begins and ends with, or of a tag inside, such as <function=
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.evaluation.judge import END_OF_THOUGHTS

SPANS = ("texts", "replies", "json", "calls", "structural")
# A bit for each of them, a token each.
Marks = NDArray[np.uint8]

_SIGNS = re.compile(r'["{}\[\]:,\n]')
# `<name>` and `</name>` are whole; of `<name=value>` the value is the model's to choose.
_TAGS = re.compile(r"</?\w+>|<\w+=|(?<=\w)>")


def marks_of_text(tokens: int) -> Marks:
    return np.full(tokens, _bit("texts"), np.uint8)


def marks_of_reply(
    text: str, offsets: Sequence[tuple[int, int]], section: str, form: ToolFormat | None
) -> Marks:
    """`offsets` are where each token begins and ends in the text."""
    answer = text.rfind(END_OF_THOUGHTS) + len(END_OF_THOUGHTS) if END_OF_THOUGHTS in text else 0
    held = {
        "json": [(answer, len(text))] if section == "json" else [],
        "calls": list(_calls(text, answer, form)) if form else [],
    }
    characters = np.full(len(text), _bit("replies"), np.uint8)
    for name, places in held.items():
        for start, end in places:
            characters[start:end] |= _bit(name)
            patterns = [_SIGNS, *((_TAGS, _ends(form)) if name == "calls" and form else ())]
            for found in (m for pattern in patterns for m in pattern.finditer(text, start, end)):
                characters[found.start() : found.end()] |= _bit("structural")
    return np.array(
        [_bit("replies") | np.bitwise_or.reduce(characters[a:b]) for a, b in offsets], np.uint8
    )


def inside(marks: Marks, span: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (marks & _bit(span)) != 0
    return found


def _calls(text: str, at: int, form: ToolFormat) -> Iterator[tuple[int, int]]:
    while (start := text.find(form.start, at)) >= 0:
        end = text.find(form.end, start) if form.end else -1
        at = len(text) if end < 0 else end + len(form.end)
        yield start, at


def _ends(form: ToolFormat) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(end) for end in (form.start, form.end) if end))


def _bit(span: str) -> int:
    return 1 << SPANS.index(span)
