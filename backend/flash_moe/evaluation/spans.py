"""Which predicted tokens have to be exact: JSON, calls, and the characters that structure them.

texts        all tokens of texts
replies      all tokens of right replies
json         right replies of the section json, without their thoughts
calls        calls in right replies, from the first character of their format to the last
structural   of json and calls: tokens that contain one of "{}[]:, or a line break, or a part of
             what begins or ends a call, or of a tag inside of it, such as <function=
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_

import numpy as np
from numpy.typing import NDArray

from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.evaluation.judge import END_OF_THOUGHTS

SPANS = ("texts", "replies", "json", "calls", "structural")
# For each token, one bit for each of the spans.
SpanMarks = NDArray[np.uint8]

_SIGNS = re.compile(r'["{}\[\]:,\n]')
# `<name>` and `</name>` count whole; of `<name=value>` the value is the model's choice.
_TAGS = re.compile(r"</?\w+>|<\w+=|(?<=\w)>")


def marks_of_text(tokens: int) -> SpanMarks:
    return np.full(tokens, _bit("texts"), np.uint8)


def marks_of_reply(
    text: str, offsets: Sequence[tuple[int, int]], section: str, tool_format: ToolFormat | None
) -> SpanMarks:
    """`offsets` are where each token begins and ends in the text."""
    start = text.rfind(END_OF_THOUGHTS) + len(END_OF_THOUGHTS) if END_OF_THOUGHTS in text else 0
    characters = np.full(len(text), _bit("replies"), np.uint8)
    if section == "json":
        _mark(characters, text, (start, len(text)), "json", [_SIGNS])
    if tool_format is not None:
        patterns = [_SIGNS, _TAGS, _ends(tool_format)]
        for place in _calls(text, start, tool_format):
            _mark(characters, text, place, "calls", patterns)
    return np.array(
        [reduce(or_, characters[a:b].tolist(), _bit("replies")) for a, b in offsets], np.uint8
    )


def inside(marks: SpanMarks, span: str) -> NDArray[np.bool_]:
    flags: NDArray[np.bool_] = (marks & _bit(span)) != 0
    return flags


def _mark(
    characters: SpanMarks,
    text: str,
    place: tuple[int, int],
    span: str,
    patterns: Sequence[re.Pattern[str]],
) -> None:
    """Mark a place as a span, and what matches inside of it as structural."""
    start, end = place
    characters[start:end] |= _bit(span)
    for pattern in patterns:
        for match in pattern.finditer(text, start, end):
            characters[match.start() : match.end()] |= _bit("structural")


def _calls(text: str, at: int, tool_format: ToolFormat) -> Iterator[tuple[int, int]]:
    while (start := text.find(tool_format.start, at)) >= 0:
        end = text.find(tool_format.end, start) if tool_format.end else -1
        at = len(text) if end < 0 else end + len(tool_format.end)
        yield start, at


def _ends(tool_format: ToolFormat) -> re.Pattern[str]:
    ends = (tool_format.start, tool_format.end)
    return re.compile("|".join(re.escape(end) for end in ends if end))


def _bit(span: str) -> int:
    return 1 << SPANS.index(span)
