"""Render a checkpoint's chat template: bare jinja2, sandboxed, as transformers does it.

A template is code from a download, so it runs in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flash_moe.errors import CheckpointError, OptionError


class Template:
    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"The model's chat template is broken: {error}.") from error

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """The conversation as text, with the opening of the assistant's turn."""
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                **self._special_tokens,
                **variables,
            )
        except TemplateError as error:
            raise OptionError(
                f"The model's chat template does not take this conversation: {error}."
            ) from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
