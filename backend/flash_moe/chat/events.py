"""Split a reply, as it streams, into thoughts, answer and tool calls.

Works on text, because some formats mark their parts with special tokens and others with plain
characters. Text that might be the start of a marker waits until it is clear whether it is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flash_moe.chat.event import Event
from flash_moe.chat.stops import overlap
from flash_moe.chat.tool_calls import ToolFormat

# A function's name, as soon as it is certain, while the call itself is still incomplete.
EARLY_NAME = re.compile(r'\s*(?:<function=([^>\s]+)>|\{\s*"name"\s*:\s*"([^"\\]+)")')


@dataclass(frozen=True, slots=True)
class Markers:
    """How a model marks the parts of its replies; empty for parts that it does not have."""

    thought: tuple[str, str] = ("", "")
    tool_format: ToolFormat | None = None
    tools: Sequence[dict[str, Any]] = ()

    def all(self) -> set[str]:
        call = (self.tool_format.start, self.tool_format.end) if self.tool_format else ()
        return {*self.thought, *call} - {""}


class Splitter:
    """Feed it text, get events. `thinking` says whether the model is in a thought."""

    def __init__(self, markers: Markers, thinking: bool) -> None:
        self.markers = markers
        self.thinking = thinking
        self._pending = ""
        self._in_call = self._named = False
        self._calls = 0
        # White space around a thought and before a call belongs to the format.
        self._strip = thinking
        self._at_start = True

    def feed(self, text: str) -> list[Event]:
        self._pending += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """The rest, at the end of the reply. A call that was cut off comes as text."""
        rest, self._pending = self._pending, ""
        tool_format = self.markers.tool_format
        if self._in_call and tool_format is not None:
            if tool_format.end:
                return [Event("text", tool_format.start + rest)]
            return self._call_events(rest)
        if not rest.strip() and (self.thinking or self._strip or not rest):
            return []
        return [Event("reasoning" if self.thinking else "text", rest)]

    def _advance(self, events: list[Event]) -> bool:
        """Read one part as far as it goes; True if another part has begun."""
        if self._in_call:
            return self._read_call(events)
        return self._read_thought(events) if self.thinking else self._read_answer(events)

    def _read_thought(self, events: list[Event]) -> bool:
        marker = self._read_until(events, "reasoning", self.markers.thought[1])
        if marker:
            self.thinking, self._strip, self._at_start = False, True, False
        return marker is not None

    def _read_answer(self, events: list[Event]) -> bool:
        tool_format, (think, _) = self.markers.tool_format, self.markers.thought
        # A reply may open with a thought; further on, the marker is plain text.
        starts = [think if self._at_start else "", tool_format.start if tool_format else ""]
        marker = self._read_until(events, "text", *starts)
        if marker == think and marker:
            self.thinking, self._strip = True, True
        elif marker:
            self._in_call, self._named = True, False
        return marker is not None

    def _read_call(self, events: list[Event]) -> bool:
        tool_format = self.markers.tool_format
        assert tool_format is not None
        if not self._named and (match := EARLY_NAME.match(self._pending)):
            events.append(Event("call_name", match[1] or match[2], self._calls))
            self._named = True
        end = tool_format.end
        inside, end, rest = self._pending.partition(end) if end else ("", "", "")
        if not end:
            return False
        self._pending, self._in_call, self._strip = rest, False, True
        events += self._call_events(inside)
        return True

    def _call_events(self, inside: str) -> list[Event]:
        """A call that cannot be parsed comes as text, so that nothing is lost."""
        tool_format, tools = self.markers.tool_format, self.markers.tools
        assert tool_format is not None
        text = tool_format.start + inside + tool_format.end
        calls = tool_format.calls(text, tools)
        if not calls:
            return [Event("text", text)]
        events = []
        for call in calls:
            if not self._named:
                events.append(Event("call_name", call["name"], self._calls))
            events.append(Event("call", index=self._calls, call=call))
            self._named, self._calls = False, self._calls + 1
        return events

    def _read_until(
        self, events: list[Event], kind: Literal["text", "reasoning"], *markers: str
    ) -> str | None:
        """Emit the pending text up to the first of the markers; drop and return that marker."""
        markers = tuple(marker for marker in markers if marker)
        at, marker = min(
            ((i, m) for m in markers if (i := self._pending.find(m)) >= 0), default=(-1, None)
        )
        if marker is None:
            uncertain = max((overlap(self._pending, m) for m in markers), default=0)
            text = self._pending[: len(self._pending) - uncertain]
            # Without markers there is no format that the white space could belong to.
            text = text.rstrip() if markers else text
            self._pending = self._pending[len(text) :]
        else:
            text, self._pending = self._pending[:at].rstrip(), self._pending[at + len(marker) :]
        if self._strip:
            text = text.lstrip()
        if text:
            events.append(Event(kind, text))
            self._strip = self._at_start = False
        return marker
