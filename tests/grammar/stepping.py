"""Step a constraint by hand, token by token, without a model."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from flash_moe.chat.template import Template
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.decode.constraint import Constraint
from flash_moe.grammar.grammar import Grammar
from flash_moe.synth.tokenizer import TEMPLATE, make_tokenizer

SYNTHETIC = make_tokenizer()
STOPS = frozenset(SYNTHETIC.stop_tokens)
STOP = min(STOPS)


def new_tokenizer(template: str = TEMPLATE) -> ChatTokenizer:
    return ChatTokenizer(Tokenizer.from_str(SYNTHETIC.json), Template(template, {}), STOPS)


TOKENIZER = new_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


[OPENS], [CLOSES] = ids("<think>"), ids("</think>")


def prompt(text: str = "?", *, thinking: bool = False) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return TOKENIZER.encode_chat(messages, enable_thinking=thinking)


def schema_constraint(
    schema: dict[str, Any], after: list[int] | None = None, **options: Any
) -> Constraint:
    constraint = Grammar.for_schema(TOKENIZER, schema).constraint(after or prompt(), **options)
    assert constraint is not None
    return constraint


def allowed(constraint: Constraint) -> list[int]:
    mask = constraint.mask()
    assert mask is not None
    tokens: list[int] = np.flatnonzero(mask).tolist()
    return tokens


def accept(constraint: Constraint, tokens: list[int]) -> Constraint:
    for token in tokens:
        assert constraint.accept(token)
    return constraint


def takes(constraint: Constraint, text: str) -> bool:
    """Whether a constraint allows a text, and would let the reply end there."""
    for token in ids(text):
        mask = constraint.mask()
        if mask is not None and not (token < len(mask) and mask[token]):
            return False
        constraint.accept(token)
    return constraint.complete
