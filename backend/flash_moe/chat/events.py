"""A reply as it streams, told apart: thoughts, answer, calls of tools.

Everything is found in the text, since some formats mark it with tokens of their own and some with
plain characters; nothing that may be the start of a marker is given out early.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flash_moe.chat.stops import overlap
from flash_moe.chat.tool_calls import Call, ToolFormat

# A function's name, where it is sure before the call is complete.
EARLY_NAME = re.compile(r'\s*(?:<function=([^>\s]+)>|\{\s*"name"\s*:\s*"([^"\\]+)")')


@dataclass(frozen=True, slots=True)
class Event:
    """text and reasoning come in pieces. A call is told of by its name as soon as that is known,
    and again when it is complete, with its arguments; `index` says which call it is."""

    kind: Literal["text", "reasoning", "call_name", "call"]
    text: str = ""
    index: int = 0
    call: Call | None = None


@dataclass(frozen=True, slots=True)
class Markers:
    """What tells the parts of a model's replies apart; empty where it has no such part."""

    thought: tuple[str, str] = ("", "")
    form: ToolFormat | None = None
    tools: Sequence[dict[str, Any]] = ()

    def all(self) -> set[str]:
        form = self.form
        return {*self.thought, *((form.start, form.end) if form else ())} - {""}


class Splitter:
    """Feed text as it comes, get events. `thinking` says whether a thought is being written."""

    def __init__(self, markers: Markers, thinking: bool) -> None:
        self._markers = markers
        self._held = ""
        self._calls = 0
        self._in_call = self._named = False
        # White space around a thought and before a call belongs to the format.
        self._leading = thinking
        self._untold = True
        self.thinking = thinking

    def feed(self, text: str) -> list[Event]:
        self._held += text
        found: list[Event] = []
        while self._advance(found):
            pass
        return found

    def finish(self) -> list[Event]:
        """The rest, when no more text will come. A call that was cut off is given as text."""
        held, self._held = self._held, ""
        form = self._markers.form
        if self._in_call and form is not None:
            return [Event("text", form.start + held)] if form.end else self._called(held)
        if not held.strip() and (self.thinking or self._leading or not held):
            return []
        return [Event("reasoning" if self.thinking else "text", held)]

    def _advance(self, found: list[Event]) -> bool:
        """Take what can be taken from what is held; whether another part has begun."""
        if self._in_call:
            return self._call(found)
        return self._thought(found) if self.thinking else self._answer(found)

    def _thought(self, found: list[Event]) -> bool:
        begun = self._take(found, "reasoning", self._markers.thought[1])
        if begun:
            self.thinking, self._leading, self._untold = False, True, False
        return begun is not None

    def _answer(self, found: list[Event]) -> bool:
        form, (think, _) = self._markers.form, self._markers.thought
        # A reply may open its thought itself; later such a marker is but text.
        starts = [think if self._untold else "", form.start if form else ""]
        begun = self._take(found, "text", *starts)
        if begun == think and begun:
            self.thinking, self._leading = True, True
        elif begun:
            self._in_call, self._named = True, False
        return begun is not None

    def _call(self, found: list[Event]) -> bool:
        form = self._markers.form
        assert form is not None
        if not self._named and (match := EARLY_NAME.match(self._held)):
            found.append(Event("call_name", match[1] or match[2], self._calls))
            self._named = True
        inside, end, rest = self._held.partition(form.end) if form.end else ("", "", "")
        if not end:
            return False
        self._held, self._in_call, self._leading = rest, False, True
        found += self._called(inside)
        return True

    def _called(self, inside: str) -> list[Event]:
        """What cannot be read as a call is given as it was written: nothing is lost."""
        form, tools = self._markers.form, self._markers.tools
        assert form is not None
        calls = form.calls(form.start + inside + form.end, tools)
        if not calls:
            return [Event("text", form.start + inside + form.end)]
        found = []
        for call in calls:
            if not self._named:
                found.append(Event("call_name", call["name"], self._calls))
            found.append(Event("call", index=self._calls, call=call))
            self._named, self._calls = False, self._calls + 1
        return found

    def _take(
        self, found: list[Event], kind: Literal["text", "reasoning"], *markers: str
    ) -> str | None:
        """Give out what is held up to the first marker, which is returned, and dropped."""
        markers = tuple(marker for marker in markers if marker)
        at, marker = min(
            ((i, m) for m in markers if (i := self._held.find(m)) >= 0), default=(-1, None)
        )
        if marker is None:
            keep = max((overlap(self._held, m) for m in markers), default=0)
            given = self._held[: len(self._held) - keep]
            # Without markers there is no format that the white space could belong to.
            given = given[: len(given.rstrip())] if markers else given
            self._held = self._held[len(given) :]
        else:
            given, self._held = self._held[:at].rstrip(), self._held[at + len(marker) :]
        if self._leading:
            stripped = given.lstrip()
            if marker is None and not stripped:
                return None
            given = stripped
        if given:
            found.append(Event(kind, given))
            self._leading = self._untold = False
        return marker
