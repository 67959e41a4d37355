"""Stop strings in streamed text. Text that might be the start of one waits until that is clear."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Feed it text, get back the text that can be shown. A stop string sets `stopped`; neither it
    nor anything after it is shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._pending = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that can be shown now."""
        if self.stopped:
            return ""
        self._pending += text
        # The first to be complete, the longest of several: the cuts between pieces do not matter.
        matches = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._pending.find(stop)) >= 0
        ]
        if matches:
            self.stopped = True
            text, self._pending = self._pending[: min(matches)[1]], ""
            return text
        uncertain = max((overlap(self._pending, stop) for stop in self._stops), default=0)
        clear = len(self._pending) - uncertain
        text, self._pending = self._pending[:clear], self._pending[clear:]
        return text

    def finish(self) -> str:
        """The rest, at the end of the reply."""
        text, self._pending = self._pending, ""
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0
    )
