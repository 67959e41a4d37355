"""Grammars for constrained replies: JSON that matches a schema, calls of declared tools, or both.

A Grammar is compiled once and serves any number of replies; each gets its own constraint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flash_moe.chat.thought import find_thought
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.decode.constraint import Constraint, Unconstrained
from flash_moe.errors import OptionError
from flash_moe.grammar.constraints import Calling, Either, Matching, Thinking
from flash_moe.grammar.json_schema import one_line, prepared, require_schema
from flash_moe.grammar.tools import GRAMMARS
from flash_moe.grammar.vocabulary import vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

# gpt-oss starts every part of a reply with it, thoughts and answers alike.
CHANNEL = "<|channel|>"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar may be empty: when nothing was asked for, or when calls come in a format for which
    we have none. Then `constrains` is False, and only a thinking budget has any effect."""

    tokenizer: ChatTokenizer
    # For the answer as one value, and for a call, which starts with the token `_start`.
    _value: LLMatcher | None = None
    _call: LLMatcher | None = None
    _start: int | None = None

    @classmethod
    def for_schema(cls, tokenizer: ChatTokenizer, schema: dict[str, Any]) -> Grammar:
        """OptionError if the schema has a keyword that no grammar can express."""
        from llguidance import LLMatcher

        require_schema(schema)
        if tokenizer.tokenizer.token_to_id(CHANNEL) is not None:
            raise OptionError(
                "This model divides its replies into channels, which a schema cannot constrain."
            )
        text = LLMatcher.grammar_from_json_schema(json.dumps(prepared(schema)))
        return cls(tokenizer, _compiled(tokenizer, text, "schema"))

    @classmethod
    def for_tools(
        cls,
        tokenizer: ChatTokenizer,
        tools: Sequence[dict[str, Any]],
        tool_format: ToolFormat | None,
    ) -> Grammar:
        """Empty unless we know the format and its markers are single tokens."""
        if not tools:
            raise OptionError("tools is empty: there is nothing to call.")
        if tool_format is None or tool_format.name not in GRAMMARS:
            return cls(tokenizer)
        token_id = tokenizer.tokenizer.token_to_id
        start, end = token_id(tool_format.start), token_id(tool_format.end)
        if start is None or end is None:
            return cls(tokenizer)
        text = GRAMMARS[tool_format.name](tools, f"<[{end}]>")
        return cls(tokenizer, None, _compiled(tokenizer, text, "tools"), start)

    @classmethod
    def for_both(
        cls,
        tokenizer: ChatTokenizer,
        schema: dict[str, Any],
        tools: Sequence[dict[str, Any]],
        tool_format: ToolFormat | None,
    ) -> Grammar:
        """A reply is either tool calls or the value."""
        value = cls.for_schema(tokenizer, schema)
        calls = cls.for_tools(tokenizer, tools, tool_format)
        if calls._start is None:
            raise OptionError(
                "We have no grammar for this model's tool calls, so a reply cannot have both tools "
                "and a schema: choose one of them."
            )
        return cls(tokenizer, value._value, calls._call, calls._start)

    @classmethod
    def free(cls, tokenizer: ChatTokenizer) -> Grammar:
        """An empty one."""
        return cls(tokenizer)

    @property
    def constrains(self) -> bool:
        return self._value is not None or self._call is not None

    def constraint(
        self,
        prompt: Sequence[int],
        *,
        thinking_budget: int | None = None,
        call_at_once: bool = False,
    ) -> Constraint | None:
        """For one reply to a prompt; None if there is nothing to constrain.

        A prompt may end in an open thought, or with the token that starts a call. After
        `thinking_budget` tokens a thought is closed. With `call_at_once`, the answer is a call.
        """
        if thinking_budget is not None and thinking_budget < 0:
            raise OptionError(f"thinking_budget={thinking_budget}: choose 0 or more.")
        inside = self._start is not None and bool(prompt) and prompt[-1] == self._start
        answer = self._answer(inside, call_at_once)
        thought = find_thought(self.tokenizer)
        if thought is None or inside:
            return None if isinstance(answer, Unconstrained) else answer
        stops = self.tokenizer.stop_tokens
        thinking = thought.is_open(prompt, stops)
        one_value = self._value is not None
        if isinstance(answer, Unconstrained) and thinking_budget is None:
            return None
        if one_value and not thinking:
            return answer
        return Thinking(
            thought,
            answer,
            inside=thinking,
            budget=thinking_budget,
            answer_needed=one_value,
            stop_tokens=stops,
        )

    def _answer(self, inside: bool, call_at_once: bool) -> Constraint:
        value = None if self._value is None else Matching(self._value.deep_copy())
        if self._call is None or self._start is None:
            return value or Unconstrained()
        if value is None or inside or call_at_once:
            return Calling(self._start, self._call, inside=inside, at_once=call_at_once)
        return Either(self._start, self._call, value)


def _compiled(tokenizer: ChatTokenizer, text: str, argument: str) -> LLMatcher:
    from llguidance import LLMatcher

    # By default it also prints its errors.
    matcher = LLMatcher(vocabulary(tokenizer), text, log_level=0)
    if matcher.is_error():
        raise OptionError(
            f"No grammar can express the {argument} ({one_line(matcher.get_error())})."
        )
    return matcher
