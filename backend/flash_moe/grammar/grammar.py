"""Held to a JSON Schema, or to the tools that may be called: grammars for constrained replies.

A Grammar is compiled once and serves any number of replies; each takes a constraint from it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flash_moe.chat.thought import thought_of
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.errors import OptionError
from flash_moe.grammar.constraints import Calling, Constraint, Either, Free, Matching, Thinking
from flash_moe.grammar.json_schema import one_line, prepared, require_schema
from flash_moe.grammar.tools import GRAMMARS
from flash_moe.grammar.vocabulary import vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

# gpt-oss begins every part of a reply with it, thoughts and answer alike.
CHANNEL = "<|channel|>"


@dataclass(frozen=True, slots=True)
class Grammar:
    """`constrains` is False where calls come in a format that no grammar is known of, and where
    none was asked for; what remains then is the limit of a thought."""

    tokenizer: ChatTokenizer
    # Of the value that the answer is, and of the calls that it may have, each of which begins with
    # the token `_start`.
    _value: LLMatcher | None = None
    _call: LLMatcher | None = None
    _start: int | None = None

    @classmethod
    def for_schema(cls, tokenizer: ChatTokenizer, schema: dict[str, Any]) -> Grammar:
        """OptionError, if the schema has a keyword that no grammar can express."""
        from llguidance import LLMatcher

        require_schema(schema)
        if tokenizer.tokenizer.token_to_id(CHANNEL) is not None:
            raise OptionError(
                "Replies of this model are divided into channels, and cannot be held to a schema."
            )
        text = LLMatcher.grammar_from_json_schema(json.dumps(prepared(schema)))
        return cls(tokenizer, _compiled(tokenizer, text, "schema"))

    @classmethod
    def for_tools(
        cls, tokenizer: ChatTokenizer, tools: Sequence[dict[str, Any]], form: ToolFormat | None
    ) -> Grammar:
        if not tools:
            raise OptionError("There are no tools to call.")
        token_id = tokenizer.tokenizer.token_to_id
        start = None if form is None else token_id(form.start)
        end = None if form is None else token_id(form.end)
        if form is None or form.name not in GRAMMARS or start is None or end is None:
            return cls(tokenizer)
        text = GRAMMARS[form.name](tools, f"<[{end}]>")
        return cls(tokenizer, None, _compiled(tokenizer, text, "tools"), start)

    @classmethod
    def for_both(
        cls,
        tokenizer: ChatTokenizer,
        schema: dict[str, Any],
        tools: Sequence[dict[str, Any]],
        form: ToolFormat | None,
    ) -> Grammar:
        """Calls, or at last the value."""
        value, calls = cls.for_schema(tokenizer, schema), cls.for_tools(tokenizer, tools, form)
        if calls._start is None:
            raise OptionError(
                "Calls have no grammar in the format of this model, so a reply cannot be held to a "
                "schema while there are tools to call: leave out one."
            )
        return cls(tokenizer, value._value, calls._call, calls._start)

    @classmethod
    def free(cls, tokenizer: ChatTokenizer) -> Grammar:
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
        """For one reply to a prompt; None if there is nothing to be held to.

        A prompt may end in an open thought, or with the token that starts a call. After
        `thinking_budget` tokens a thought is closed. `call_at_once` makes a call of the answer.
        """
        if thinking_budget is not None and thinking_budget < 0:
            raise OptionError(f"thinking_budget={thinking_budget}: choose 0 or more.")
        inside = self._start is not None and bool(prompt) and prompt[-1] == self._start
        answer = self._answer(inside, call_at_once)
        thought = thought_of(self.tokenizer)
        if thought is None or inside:
            return None if isinstance(answer, Free) else answer
        stops = self.tokenizer.stop_tokens
        thinking = thought.is_open(prompt, stops)
        one_value = self._value is not None
        if isinstance(answer, Free) and thinking_budget is None:
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
            return value or Free()
        if value is None or inside or call_at_once:
            return Calling(self._start, self._call, inside=inside, at_once=call_at_once)
        return Either(self._start, self._call, value)


def _compiled(tokenizer: ChatTokenizer, text: str, what: str) -> LLMatcher:
    from llguidance import LLMatcher

    # The library prints what it minds, unless told not to.
    matcher = LLMatcher(vocabulary(tokenizer), text, log_level=0)
    if matcher.is_error():
        raise OptionError(
            f"No grammar can be made of the {what} ({one_line(matcher.get_error())})."
        )
    return matcher
