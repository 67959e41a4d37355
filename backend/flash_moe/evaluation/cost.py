"""What measuring took: tokens, seconds, and bytes of experts read for them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flash_moe.stream.streamed import Streamer


@dataclass(slots=True)
class Cost:
    tokens: int = 0
    seconds: float = 0.0
    expert_bytes: int = 0

    def add(self, other: Cost) -> None:
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.expert_bytes += other.expert_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 2) if self.seconds else None,
            "expert_bytes": self.expert_bytes,
            "expert_bytes_per_token": self.expert_bytes / self.tokens if self.tokens else None,
        }


class Meter:
    """Counts from when it is made."""

    def __init__(self, streamer: Streamer) -> None:
        self._counters = streamer.reader.counters
        self._start = time.perf_counter()
        self._nbytes = self._counters.nbytes

    def cost(self, tokens: int) -> Cost:
        seconds = time.perf_counter() - self._start
        return Cost(tokens, seconds, self._counters.nbytes - self._nbytes)
