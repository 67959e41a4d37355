"""Render a checkpoint's chat template with plain jinja2, the way transformers does.

A template is downloaded code, so it runs in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flash_moe.errors import CheckpointError, OptionError

# The grammar only filters what the model writes; the model must still be told what to write.
SCHEMA_PROMPT = "Reply with JSON that matches this schema:\n{}"


class _Generation(Extension):
    """`{% generation %}` marks the text that models are trained on. Rendering keeps the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Template:
    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
        # The way it writes tool calls decides which parser reads them.
        self.source = source
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # not only TemplateError: nesting too deep raises others
            raise CheckpointError(
                f"The model's chat template is broken: {_one_line(error)}."
            ) from error

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """The conversation as text. It ends with the opening of the assistant's turn, unless
        `add_generation_prompt` is False."""
        try:
            return self._template.render(
                messages=[_with_thinking(message) for message in messages],
                **self._special_tokens,
                **{"add_generation_prompt": True, "tools": None, "documents": None, **variables},
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise OptionError(
                f"The model's chat template rejects this conversation: {_one_line(error)}."
            ) from error


def with_schema(messages: Sequence[dict[str, Any]], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation with a request for matching JSON at the end of its system prompt."""
    request = SCHEMA_PROMPT.format(json.dumps(schema))
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{first['content']}\n\n{request}"}, *rest]
    return [{"role": "system", "content": request}, *messages]


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The same message with its reasoning under gpt-oss's name for it, too."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _one_line(error: Exception) -> str:
    """The message on one line. jinja2's explain themselves; others need the name of their type."""
    text = " ".join(str(error).split()).rstrip(".") or "no reason given"
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
