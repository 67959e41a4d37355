"""What the generators make and the corpus renders: one conversation, and how to judge its reply."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """`messages` as chat templates take them; the last one is the assistant's, to be learned.

    An assistant's message may have `reasoning_content` (only where `thinking` is set) and
    `tool_calls` ({"type": "function", "function": {"name", "arguments"}}), a tool's answer has the
    role "tool". `check` says what a right last reply is, with exactly one key:

        {"equals": text}            this text, but for white space and case
        {"contains": [text, …]}     every one of these, but for case
        {"json": value, "schema": schema}  this JSON value, valid against this schema
        {"schema": schema}          any JSON value that is valid against this schema
        {"calls": [{"name", "arguments"}, …]}  these calls and no others
    """

    kind: str
    messages: list[Message]
    check: dict[str, Any]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False


class Generator(Protocol):
    """A module with these two functions; both are pure in `random` and never end.

    What `held_out` asks for is never in `train`: not other wording alone, but, where the subject
    allows it, other numbers, names, schemas and tools, told apart by `reserved`.
    """

    def train(self, random: Random) -> Iterator[Dialogue]: ...

    def held_out(self, random: Random) -> Iterator[Dialogue]: ...


def reserved(*parts: object, share: float = 0.05) -> bool:
    """Whether this content is kept from training: the same on every machine and Python."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def assistant(text: str, *, thoughts: str | None = None) -> Message:
    return {"role": "assistant", "content": text} | (
        {} if thoughts is None else {"reasoning_content": thoughts}
    )


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
