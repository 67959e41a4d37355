"""The statistics of one reply. Seconds add up: I/O, read-back and computing are all of the time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from flash_moe.clock import take
from flash_moe.process import bytes_from_disk, peak_memory

if TYPE_CHECKING:
    from flash_moe.stream.streamed import Streamer


@dataclass(slots=True)
class Stats:
    """Complete at the end of a reply; `finish_reason` is then stop, length, loop or cancelled.

    mapped_bytes of the expert bytes were computed where the page cache had them, the others read;
    hit_rate is the share that came from the page cache in either way, where the system says;
    mapped_rss_bytes of the peak are pages of that cache, which the system takes back when it wants.
    io_seconds is time spent reading; readback_seconds is time spent waiting for the router's
    choice, and so for the computing that leads to it; compute_seconds is all the rest.
    cached_tokens of the prompt were computed for an earlier one; prompt_tokens_per_second counts
    only the others. Of the tokens under a mask, the forced ones among them, allowed_mass is how
    much probability the model itself gave to what the mask allowed: the mean over those that it
    chose. `sampling` is how tokens were chosen. `warning` is for the user: something did not work,
    but the reply is what it would be.

    first_word has the parts of the time before the first word, loading included if this reply
    loaded the model, in seconds that add up; saving_seconds is what a command waits for after the
    last one. seconds_to_first_token begins when the prompt is in tokens.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    reasoning_tokens: int = 0
    finish_reason: str = "length"
    load_seconds: float = 0.0
    first_word: dict[str, float] = field(default_factory=dict)
    seconds_to_first_token: float = 0.0
    prompt_tokens_per_second: float = 0.0
    tokens_per_second: float = 0.0
    expert_bytes: int = 0
    mapped_bytes: int = 0
    hit_rate: float | None = None
    experts_read: int = 0
    gigabytes_per_second: float = 0.0
    io_seconds: float = 0.0
    readback_seconds: float = 0.0
    compute_seconds: float = 0.0
    constrained_tokens: int = 0
    forced_tokens: int = 0
    mask_seconds: float = 0.0
    saving_seconds: float = 0.0
    allowed_mass: float = 1.0
    peak_rss_bytes: int = 0
    mapped_rss_bytes: int = 0
    experts_per_token: int = 0
    bits: str = ""
    runtime: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    warning: str = ""

    def to_json(self) -> dict[str, Any]:
        return {key: _rounded(value) for key, value in asdict(self).items()}

    def summary(self) -> str:
        """Three lines for people."""
        reused = f", {self.cached_tokens} of them reused" if self.cached_tokens else ""
        hits = "" if self.hit_rate is None else f", {self.hit_rate:.0%} of them cached"
        read = self.expert_bytes - self.mapped_bytes
        mapped = self.mapped_rss_bytes
        shared = f", {mapped / 1e6:,.0f} MB of it page cache" if mapped else ""
        return (
            f"{self.prompt_tokens} prompt tokens{reused} at {self.prompt_tokens_per_second:.1f}/s, "
            f"first token after {self.seconds_to_first_token:.2f} s; "
            f"{self.generated_tokens} tokens at {self.tokens_per_second:.1f}/s "
            f"({self.finish_reason}), {self.runtime} runtime\n"
            f"{self.expert_bytes / 1e6:,.1f} MB of experts{hits}; {read / 1e6:,.1f} MB read at "
            f"{self.gigabytes_per_second:.2f} GB/s; I/O {self.io_seconds:.2f} s, read-back "
            f"{self.readback_seconds:.2f} s, compute {self.compute_seconds:.2f} s; peak "
            f"memory {self.peak_rss_bytes / 1e6:,.0f} MB{shared}\n"
            f"first word after {sum(self.first_word.values()):.2f} s: "
            + ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.first_word.items())
            + f"; saving the prompt, after the last: {self.saving_seconds:.2f}"
        )


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


class StopWatch:
    """Reads the counters of a streamer at the start of a reply, and fills in `stats` at its end."""

    def __init__(self, streamer: Streamer, stats: Stats) -> None:
        self.stats = stats
        self.stats.first_word = take()
        self._streamer = streamer
        self._start = time.perf_counter()
        self._first: float | None = None
        self._from_disk = bytes_from_disk()
        counters = streamer.reader.counters
        self._before = (counters.nbytes, counters.experts, counters.seconds, counters.mapped)
        self._readback = streamer.readback_seconds

    def token(self) -> None:
        self.stats.generated_tokens += 1
        if self._first is None:
            self._first = time.perf_counter()
            waited, spent = self._first - self._start, take()
            spent["prompt"] = waited - sum(spent.values())
            for name, seconds in spent.items():
                self.stats.first_word[name] = self.stats.first_word.get(name, 0.0) + seconds

    def stop(self) -> None:
        now, stats, counters = time.perf_counter(), self.stats, self._streamer.reader.counters
        stats.expert_bytes = counters.nbytes - self._before[0]
        stats.experts_read = counters.experts - self._before[1]
        stats.mapped_bytes = counters.mapped - self._before[3]
        stats.io_seconds = counters.seconds - self._before[2]
        stats.readback_seconds = self._streamer.readback_seconds - self._readback
        stats.compute_seconds = now - self._start - stats.io_seconds - stats.readback_seconds
        stats.hit_rate = self._hit_rate(stats.expert_bytes)
        if stats.io_seconds:
            read = stats.expert_bytes - stats.mapped_bytes
            stats.gigabytes_per_second = read / stats.io_seconds / 1e9
        if self._first is not None:
            stats.seconds_to_first_token = self._first - self._start
            computed = stats.prompt_tokens - stats.cached_tokens
            stats.prompt_tokens_per_second = computed / stats.seconds_to_first_token
            if stats.generated_tokens > 1:
                stats.tokens_per_second = (stats.generated_tokens - 1) / (now - self._first)
        stats.peak_rss_bytes = peak_memory()
        mapping = self._streamer.mapping
        stats.mapped_rss_bytes = 0 if mapping is None else mapping.mapped

    def _hit_rate(self, read: int) -> float | None:
        now = bytes_from_disk()
        if now is None or self._from_disk is None or not read:
            return None
        # Read-ahead may fetch more than was asked for.
        return 1 - min(now - self._from_disk, read) / read
