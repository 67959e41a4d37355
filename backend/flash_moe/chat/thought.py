"""Where a model's thought begins and ends in tokens, and how its template closes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from flash_moe.chat.template import Template
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import OptionError

# Pairs of single tokens that models think between; the same list as mlx-lm's.
MARKERS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)
# Placeholders, to see what the template writes between a thought and an answer.
THOUGHT, ANSWER = "8f1c6", "b07e2"


@dataclass(frozen=True, slots=True)
class Thought:
    """`closing` is everything that the template writes between a thought and the answer, `after`
    the part of it behind the closing token."""

    opens: int
    closes: int
    closing: tuple[int, ...]
    after: tuple[int, ...]

    def is_open(self, prompt: Sequence[int], stop_tokens: frozenset[int]) -> bool:
        """Whether a prompt leaves the model thinking. Only the last turn counts: a user who writes
        about `<think>` opens nothing."""
        for token in reversed(prompt):
            if token == self.opens:
                return True
            if token == self.closes or token in stop_tokens:
                return False
        return False


def thought_markers(tokenizer: ChatTokenizer) -> tuple[str, str]:
    """The texts that open and close a thought; empty if the vocabulary has no such tokens."""
    token_id = tokenizer.tokenizer.token_to_id
    known = (pair for pair in MARKERS if all(token_id(marker) is not None for marker in pair))
    return next(known, ("", ""))


# Finding one renders the template, which should not happen for every reply.
_thoughts: WeakKeyDictionary[ChatTokenizer, Thought | None] = WeakKeyDictionary()


def find_thought(tokenizer: ChatTokenizer) -> Thought | None:
    """None for a model that has no tokens to think between."""
    if tokenizer not in _thoughts:
        _thoughts[tokenizer] = _find(tokenizer)
    return _thoughts[tokenizer]


def _find(tokenizer: ChatTokenizer) -> Thought | None:
    start, end = thought_markers(tokenizer)
    opens, closes = map(tokenizer.tokenizer.token_to_id, (start, end))
    if opens is None or closes is None:
        return None
    text = _closing_text(tokenizer.template, end)
    ids = tuple(tokenizer.tokenizer.encode(text, add_special_tokens=False).ids)
    if ids.count(closes) != 1:
        return Thought(opens, closes, (closes,), ())
    return Thought(opens, closes, ids, ids[ids.index(closes) + 1 :])


def _closing_text(template: Template | None, end: str) -> str:
    """The template's own, since a model does best with the exact line breaks of its training."""
    usual = f"\n{end}\n\n"
    if template is None:
        return usual
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "reasoning_content": THOUGHT, "content": ANSWER},
    ]
    try:
        text = template.render(messages, add_generation_prompt=False)
    except OptionError:
        return usual
    between = text.partition(THOUGHT)[2].partition(ANSWER)[0]
    # Many templates drop the thoughts of earlier turns.
    return between if end in between else usual
