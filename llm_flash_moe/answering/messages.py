"""llm's messages as the dictionaries that chat templates take."""

from __future__ import annotations

from typing import Any, cast

import llm
from llm.parts import AttachmentPart, Message, ReasoningPart, TextPart, ToolCallPart, ToolResultPart

from llm_flash_moe.errors import PluginError


def to_chat(prompt: llm.Prompt) -> list[dict[str, Any]]:
    """The whole conversation. A system prompt that changed on the way replaces the old one."""
    chat = [turn for message in prompt.messages for turn in _turns(message)]
    if prompt.system:
        chat = [turn for turn in chat if turn["role"] != "system"]
        chat.insert(0, {"role": "system", "content": prompt.system})
    return chat


def to_tools(prompt: llm.Prompt) -> list[dict[str, Any]]:
    """As chat templates and tool parsers take them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema or {"type": "object", "properties": {}},
            },
        }
        for tool in prompt.tools
        if isinstance(tool, llm.Tool)
    ]


def schema_of(
    prompt: llm.Prompt, response: llm.Response | llm.AsyncResponse
) -> dict[str, Any] | None:
    """What the reply is held to. llm passes it with the question, and not again with the results of
    the tool calls that answer it."""
    conversation = response.conversation
    earlier = conversation.responses if conversation else []
    for candidate in (prompt, *(one.prompt for one in reversed(earlier))):
        if candidate.schema or not candidate.tool_results:
            return cast("dict[str, Any] | None", candidate.schema)
    return None


def _turns(message: Message) -> list[dict[str, Any]]:
    # llm 0.32 looks for them only outside of conversations, and its prompts are conversations.
    if any(isinstance(part, AttachmentPart) for part in message.parts):
        raise PluginError("These models take text alone: leave the attachment out.")
    results = [part for part in message.parts if isinstance(part, ToolResultPart)]
    if results:
        return [
            {
                "role": "tool",
                "name": part.name,
                "tool_call_id": part.tool_call_id,
                "content": part.output,
            }
            for part in results
        ]
    turn: dict[str, Any] = {
        "role": message.role,
        "content": "".join(part.text for part in message.parts if isinstance(part, TextPart)),
    }
    thoughts = [part.text for part in message.parts if isinstance(part, ReasoningPart)]
    if any(thoughts):
        turn["reasoning_content"] = "".join(thoughts)
    calls = [part for part in message.parts if isinstance(part, ToolCallPart)]
    if calls:
        turn["tool_calls"] = [
            {
                "id": part.tool_call_id,
                "type": "function",
                "function": {"name": part.name, "arguments": part.arguments},
            }
            for part in calls
        ]
    return [turn]
