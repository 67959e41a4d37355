"""Read the tool calls in a reply with the parser that mlx-lm picks for the model's template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_moe.chat.event import Call
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.chat.tool_parameters import plain_tools
from flash_moe.errors import CheckpointError
from flash_moe.format.json_files import read_json_if_present
from flash_moe.upstream import tool_parser, tool_parser_name

# Parsers that tell text from JSON by the declared type, and know only plain types.
PLAIN_TYPES_ONLY = ("qwen3_coder",)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family of models writes calls. With an empty `end`, a call goes on to the next one or
    to the end of the text."""

    name: str
    start: str
    end: str
    parse: Callable[[str, Any], Any]

    def calls(self, text: str, tools: Sequence[dict[str, Any]]) -> list[Call] | None:
        """The calls in a reply, or None if one of them is malformed or unfinished."""
        calls: list[Call] = []
        for piece in text.split(self.start)[1:]:
            inside, end, _ = piece.partition(self.end) if self.end else (piece, "end", "")
            if not end:
                return None
            try:
                declared = plain_tools(tools) if self.name in PLAIN_TYPES_ONLY else list(tools)
                # Through JSON: some parsers also accept Python literals, such as sets.
                parsed = json.loads(json.dumps(self.parse(inside, declared)))
            except Exception:  # each parser fails in its own way on malformed calls
                return None
            calls += parsed if isinstance(parsed, list) else [parsed]
        return calls if all(map(is_call, calls)) else None


def find_tool_format(path: Path, tokenizer: ChatTokenizer) -> ToolFormat | None:
    """The format of a checkpoint, chosen the way mlx-lm does; None if it knows none."""
    config = path / "tokenizer_config.json"
    name = read_json_if_present(config).get("tool_parser_type")
    if name is None:
        template = None if tokenizer.template is None else tokenizer.template.source
        name = tool_parser_name(template, tokenizer.tokenizer.get_vocab)
    if name is None:
        return None
    if not isinstance(name, str) or not name.isidentifier():
        raise CheckpointError(f"{config}: tool_parser_type is {name!r:.40}, which is not a name.")
    module = tool_parser(name)
    return ToolFormat(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def is_call(value: Any) -> bool:
    """Whether a value has the form that parsers give to a call: {"name", "arguments"}."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("arguments"), dict)
    )
