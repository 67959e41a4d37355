"""What calls a reply makes, read by the parser that mlx-lm takes for the model's template."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.chat.tool_parameters import plain_tools
from flash_moe.checkpoint.folder import read_json
from flash_moe.errors import CheckpointError

Call = dict[str, Any]

# Parsers that tell text from JSON by the declared type, and know no type but a plain one.
TYPED_BY_HAND = ("qwen3_coder",)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family of models writes calls; `end` is empty where the text's end ends them."""

    name: str
    start: str
    end: str
    parse: Callable[[str, Any], Any]

    def calls(self, text: str, tools: Sequence[dict[str, Any]]) -> list[Call] | None:
        """The calls in a reply, or None if one of them cannot be read or is not finished."""
        found: list[Call] = []
        for piece in text.split(self.start)[1:]:
            inside, end, _ = piece.partition(self.end) if self.end else (piece, "end", "")
            if not end:
                return None
            try:
                # Through JSON: some parsers take Python's literals too, such as sets.
                shown = plain_tools(tools) if self.name in TYPED_BY_HAND else list(tools)
                parsed = json.loads(json.dumps(self.parse(inside, shown)))
            except Exception:  # each parser fails in its own way on what it was not made for
                return None
            found += parsed if isinstance(parsed, list) else [parsed]
        return found if all(map(is_call, found)) else None


def tool_format(path: Path, tokenizer: ChatTokenizer) -> ToolFormat | None:
    """The format of a checkpoint, found as mlx-lm finds it; None where it knows none."""
    # Brings in transformers.
    from mlx_lm.tokenizer_utils import _infer_tool_parser

    config = path / "tokenizer_config.json"
    name = read_json(config).get("tool_parser_type") if config.exists() else None
    if name is None:
        template = tokenizer.template
        name = _infer_tool_parser(
            SimpleNamespace(
                chat_template=None if template is None else template.source,
                get_vocab=tokenizer.tokenizer.get_vocab,
            )
        )
    if name is None:
        return None
    if not isinstance(name, str) or not name.isidentifier():
        raise CheckpointError(f"{config}: tool_parser_type is {name!r:.40}, which is no name.")
    try:
        module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    except ImportError as error:
        raise CheckpointError(
            f"{config} asks for the tool parser {name!r}, which this mlx-lm does not have. "
            "A newer one may: llm install -U mlx-lm"
        ) from error
    return ToolFormat(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def is_call(value: Any) -> bool:
    """Whether it is a call as parsers give it: {"name", "arguments"}."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("arguments"), dict)
    )
