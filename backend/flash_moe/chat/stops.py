"""Stop strings over streamed text: nothing that may be the start of one is given out early."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Feed text as it comes; `stopped` is set once a stop string was met, and not given out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What can be given out now."""
        if self.stopped:
            return ""
        self._held += text
        # The one complete first, the longest of those: how the text was cut changes nothing.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)[1]], ""
            return given
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        given, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return given

    def finish(self) -> str:
        """The rest, when no more text will come."""
        given, self._held = self._held, ""
        return given


def overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0
    )
