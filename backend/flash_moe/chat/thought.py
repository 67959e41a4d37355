"""Where a model's thought begins and ends in tokens, and how its template closes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flash_moe.chat.template import Template
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import OptionError

# Pairs of single tokens that models think between, as mlx-lm knows them.
MARKERS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)
# What stands for a thought and an answer while the template is asked what it puts between them.
SAID, ANSWERED = "8f1c6", "b07e2"


@dataclass(frozen=True, slots=True)
class Thought:
    """`closing` is all that the template writes between a thought and the answer, `after` the
    part of it that follows the closing token."""

    opens: int
    closes: int
    closing: tuple[int, ...]
    after: tuple[int, ...]

    def is_open(self, prompt: Sequence[int], stop_tokens: frozenset[int]) -> bool:
        """Whether a prompt leaves the model thinking. Only its last turn counts: what a user
        wrote about `<think>` opens nothing."""
        for token in reversed(prompt):
            if token == self.opens:
                return True
            if token == self.closes or token in stop_tokens:
                return False
        return False


def markers_of(tokenizer: ChatTokenizer) -> tuple[str, str]:
    """What opens and closes a thought; empty where the vocabulary has no such tokens."""
    token_id = tokenizer.tokenizer.token_to_id
    known = (pair for pair in MARKERS if all(token_id(marker) is not None for marker in pair))
    return next(known, ("", ""))


def thought_of(tokenizer: ChatTokenizer) -> Thought | None:
    """None for a model that has no tokens to think between."""
    start, end = markers_of(tokenizer)
    opens, closes = map(tokenizer.tokenizer.token_to_id, (start, end))
    if opens is None or closes is None:
        return None
    text = _between(tokenizer.template, end)
    ids = tuple(tokenizer.tokenizer.encode(text, add_special_tokens=False).ids)
    if ids.count(closes) != 1:
        return Thought(opens, closes, (closes,), ())
    return Thought(opens, closes, ids, ids[ids.index(closes) + 1 :])


def _between(template: Template | None, end: str) -> str:
    """A model is at home in the form it was trained on, down to the line breaks."""
    usual = f"\n{end}\n\n"
    if template is None:
        return usual
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "reasoning_content": SAID, "content": ANSWERED},
    ]
    try:
        text = template.render(messages, add_generation_prompt=False)
    except OptionError:
        return usual
    between = text.partition(SAID)[2].partition(ANSWERED)[0]
    # Many templates leave out what was thought before.
    return between if end in between else usual
