"""Where the chunks of a prompt end, so that a later prompt can continue from one of these places.

A state can be continued only where it was kept, and gives the same bits only if both prompts were
cut alike before that place. So the cuts are a function of what precedes them: greedily from the
start, at the next opening of a turn that is not too near, else after a full chunk. What was kept
already, or how the prompt goes on, changes none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import OptionError

# Tokens between two cuts, at least. Every cut costs a forward pass, and with experts on disk
# shorter chunks read the same experts more often; what came after the last cut is computed again.
SPACING = 32
# Tokens after the last cut that come with the first logits, instead of in a chunk of their own:
# `<|im_start|>assistant\n<think>\n` has 5.
TAIL = 16

# Different in their first and last letters, and without any that templates or tokenizers join.
ONE, OTHER = "Mind the gap", "Other words"


@dataclass(frozen=True, slots=True)
class Marks:
    """The token ids that open a turn, of the assistant and of the user. Empty: none were found,
    and a state is kept after full chunks only."""

    assistant: tuple[int, ...] = ()
    user: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Cuts:
    """`ends` of chunks, ascending, the last token of the prompt never among them; `kept` are
    those that a later prompt may well continue from."""

    ends: tuple[int, ...]
    kept: tuple[int, ...]
    total: int

    def after(self, start: int) -> list[int]:
        """What remains to be computed in chunks when a state holds `start` tokens."""
        ends = [end for end in self.ends if end > start]
        last = self.ends[-1] if self.ends else 0
        return ends if self.total - last <= TAIL else [*ends, self.total - 1]


def cut(ids: Sequence[int], marks: Marks, chunk: int) -> Cuts:
    """Cut a prompt into chunks of at most `chunk` tokens."""
    spacing = min(SPACING, max(1, chunk // 2))
    ids = list(ids)
    # Before the user speaks for the first time, there are instructions and tools, or nothing.
    system = _first(ids, marks.user) or 0
    wanted = sorted({system, *_places(ids, marks.assistant)})
    ends: list[int] = []
    last = 0
    for place in [*wanted, len(ids) - 1]:
        while place - last > chunk:
            last += chunk
            ends.append(last)
        if place in wanted and place - last >= spacing:
            last = place
            ends.append(last)
    kept = {end for end in ends if end == system or end == ends[-1]}
    return Cuts(tuple(ends), tuple(sorted(kept)), len(ids))


def find_marks(tokenizer: ChatTokenizer) -> Marks:
    """Learn from the template itself how turns open; token ids alone are compared."""
    if tokenizer.template is None:
        return Marks()
    try:
        said = _encode(tokenizer, ONE)
        asked = tokenizer.encode_chat([{"role": "user", "content": ONE}])
        other = _encode(tokenizer, OTHER)
    except OptionError:
        return Marks()
    opened = asked[common(said, asked) :]
    # Or nothing opens the assistant's turn but the end of the user's, as in [INST] … [/INST].
    assistant = _shortest(opened, said) if opened else _closing(said, other)
    try:
        again = _encode(tokenizer, ONE, OTHER)
        user = _shortest(again[common(said, again) :], opened)
    except OptionError:  # turns have to alternate; such templates seldom have instructions apart
        user = ()
    return Marks(assistant, user if _first(said, user) is not None else ())


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _encode(tokenizer: ChatTokenizer, *said: str) -> list[int]:
    messages = [{"role": "user", "content": text} for text in said]
    return tokenizer.encode_chat(messages, add_generation_prompt=False)


def _shortest(opening: list[int], elsewhere: list[int]) -> tuple[int, ...]:
    """As much of an opening as tells it from what opens or ends other turns."""
    for length in range(1, len(opening) + 1):
        mark = tuple(opening[:length])
        if _first(elsewhere, mark) is None:
            return mark
    return ()


def _closing(one: list[int], other: list[int]) -> tuple[int, ...]:
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
