"""What measuring cost: tokens, seconds, and bytes of experts read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flash_moe.stream.streamed import Streamer


@dataclass(frozen=True, slots=True)
class Cost:
    tokens: int = 0
    seconds: float = 0.0
    expert_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.expert_bytes + other.expert_bytes,
        )

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def bytes_per_token(self) -> float | None:
        return self.expert_bytes / self.tokens if self.tokens else None

    def to_json(self) -> dict[str, Any]:
        speed = self.tokens_per_second
        return {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": None if speed is None else round(speed, 2),
            "expert_bytes": self.expert_bytes,
            "expert_bytes_per_token": self.bytes_per_token,
        }


class Meter:
    """Starts counting when it is created."""

    def __init__(self, streamer: Streamer) -> None:
        self._counters = streamer.reader.counters
        self._start = time.perf_counter()
        self._nbytes = self._counters.nbytes

    def cost(self, tokens: int) -> Cost:
        seconds = time.perf_counter() - self._start
        return Cost(tokens, seconds, self._counters.nbytes - self._nbytes)
