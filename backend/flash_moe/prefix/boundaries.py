"""Where the chunks of a prompt end: at places from which a later prompt can continue.

A state can be continued only where it was saved, and gives the same bits only if both prompts were
cut alike before that place. So every cut depends only on the text before it: greedily from the
start, a chunk ends where the next turn opens, unless that is too near, or else when it is full.
Neither the states that are already saved nor the rest of the prompt moves a cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import OptionError

# The fewest tokens between two cuts. Every cut costs a forward pass, and with experts on disk
# shorter chunks read the same experts more often; tokens after the last cut are computed again.
SPACING = 32
# The most tokens after the last cut that are computed with the first logits instead of in a chunk
# of their own: `<|im_start|>assistant\n<think>\n` has 5.
TAIL = 16

# Sample messages that differ in their first and last letters, none of which templates or tokenizers
# join with the text around them.
ONE, OTHER = "Mind the gap", "Other words"


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """The token ids that open a turn of the assistant and of the user. Empty if the template has no
    distinctive ones: states are then saved after full chunks only."""

    assistant: tuple[int, ...] = ()
    user: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChunkEnds:
    """`ends` ascend and never include the last token of the prompt; `saved` are those from which a
    later prompt is likely to continue, `total` is the length of the prompt."""

    ends: tuple[int, ...]
    saved: tuple[int, ...]
    total: int

    def after(self, start: int) -> list[int]:
        """The ends of the chunks that remain when a state already holds `start` tokens."""
        ends = [end for end in self.ends if end > start]
        last = self.ends[-1] if self.ends else 0
        return ends if self.total - last <= TAIL else [*ends, self.total - 1]


def chunk_ends(ids: Sequence[int], marks: TurnMarks, chunk: int) -> ChunkEnds:
    """Cut a prompt into chunks of at most `chunk` tokens."""
    spacing = min(SPACING, max(1, chunk // 2))
    ids = list(ids)
    # Instructions and tools, if any, come before the user's first turn.
    system = _first(ids, marks.user) or 0
    openings = sorted({system, *_places(ids, marks.assistant)})
    ends: list[int] = []
    last = 0
    for place in [*openings, len(ids) - 1]:
        while place - last > chunk:
            last += chunk
            ends.append(last)
        if place in openings and place - last >= spacing:
            last = place
            ends.append(last)
    saved = {end for end in ends if end == system or end == ends[-1]}
    return ChunkEnds(tuple(ends), tuple(sorted(saved)), len(ids))


def find_turn_marks(tokenizer: ChatTokenizer) -> TurnMarks:
    """Learn how turns open by rendering sample messages and comparing their token ids."""
    if tokenizer.template is None:
        return TurnMarks()
    try:
        closed = _encode(tokenizer, ONE)
        open_turn = tokenizer.encode_chat([{"role": "user", "content": ONE}])
        other = _encode(tokenizer, OTHER)
    except OptionError:
        return TurnMarks()
    opened = open_turn[common(closed, open_turn) :]
    # In some templates the end of the user's turn opens the assistant's: [INST] … [/INST].
    assistant = _shortest(opened, closed) if opened else _closing(closed, other)
    try:
        again = _encode(tokenizer, ONE, OTHER)
        user = _shortest(again[common(closed, again) :], opened)
    except OptionError:  # turns must alternate; such templates rarely have a system turn
        user = ()
    return TurnMarks(assistant, user if _first(closed, user) is not None else ())


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _encode(tokenizer: ChatTokenizer, *texts: str) -> list[int]:
    messages = [{"role": "user", "content": text} for text in texts]
    return tokenizer.encode_chat(messages, add_generation_prompt=False)


def _shortest(opening: list[int], elsewhere: list[int]) -> tuple[int, ...]:
    """The shortest start of an opening that does not occur elsewhere."""
    for length in range(1, len(opening) + 1):
        mark = tuple(opening[:length])
        if _first(elsewhere, mark) is None:
            return mark
    return ()


def _closing(one: list[int], other: list[int]) -> tuple[int, ...]:
    """The end that two conversations share, unless it also occurs earlier."""
    length = common(one[::-1], other[::-1])
    mark = tuple(one[len(one) - length :])
    return mark if _first(one, mark) == len(one) - length else ()


def _first(ids: list[int], mark: tuple[int, ...]) -> int | None:
    return next(_places(ids, mark), None)


def _places(ids: list[int], mark: tuple[int, ...]) -> Iterator[int]:
    place = -1
    while mark:
        try:
            place = ids.index(mark[0], place + 1)
        except ValueError:
            return
        if tuple(ids[place : place + len(mark)]) == mark:
            yield place
