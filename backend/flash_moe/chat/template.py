"""Render a checkpoint's chat template: bare jinja2, sandboxed, as transformers does it.

A template is code from a download, so it runs in jinja2's immutable sandbox.
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

# A grammar lets nothing through that does not match, but only what was said can be meant.
SCHEMA_PROMPT = "Reply with JSON that matches this schema:\n{}"


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained to say; rendered, it is what it encloses."""

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
        # How it writes tool calls tells which parser reads them.
        self.source = source
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # nesting too deep, for one, is no TemplateError
            raise CheckpointError(
                f"The model's chat template is broken: {_said(error)}."
            ) from error

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """The conversation as text, with the opening of the assistant's turn, unless
        `add_generation_prompt=False` asks for none."""
        try:
            return self._template.render(
                messages=[_with_thinking(message) for message in messages],
                **self._special_tokens,
                **{"add_generation_prompt": True, "tools": None, "documents": None, **variables},
            )
        except Exception as error:  # a template is a program: it can fail in every way
            raise OptionError(
                f"The model's chat template does not take this conversation: {_said(error)}."
            ) from error


def with_schema(messages: Sequence[dict[str, Any]], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation with the wish for JSON at the end of its instructions."""
    wish = SCHEMA_PROMPT.format(json.dumps(schema))
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{first['content']}\n\n{wish}"}, *rest]
    return [{"role": "system", "content": wish}, *messages]


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """gpt-oss calls the reasoning so."""
    thoughts = message.get("reasoning_content")
    return message if thoughts is None else {"thinking": thoughts, **message}


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


def _said(error: Exception) -> str:
    """One line; the kind of error, too, where its words alone say little."""
    text = " ".join(str(error).split()).rstrip(".") or "no reason given"
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
