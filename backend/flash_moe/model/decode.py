"""The loop that makes tokens.

mlx-lm's own loop computes one token ahead, which hides the latency of a GPU; with experts on disk
it would cost a whole token of reads before the first word, and another for nothing at the end. So
this one computes a token when it is wanted, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from flash_moe.errors import OptionError
from flash_moe.measure.stats import StopWatch
from flash_moe.model.load import StreamedModel
from flash_moe.model.sampling import Sampling

Progress = Callable[[int, int], None]

# Every routed row of a chunk exists at once, in and out of the experts: 397B at bf16, K=10, has
# 0.3 MB a token. Larger chunks read fewer experts twice; 2048 is where mlx-lm stops, too.
CHUNK_BYTES = 96 << 20
LARGEST_CHUNK, SMALLEST_CHUNK = 2048, 16
# Without Metal, mlx-lm unrolls recurrent layers into a graph a token, 0.15 MB each; 2,000 tokens
# of a small model took 290 MB in one chunk, 90 MB in chunks of 512, at the same speed.
LARGEST_UNROLLED_CHUNK = 512


class Generation:
    """Tokens of one reply, computed as they are asked for. Iterate once, in the model's thread."""

    def __init__(
        self,
        model: StreamedModel,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling = Sampling(),
        stop_tokens: frozenset[int] = frozenset(),
        cache: list[Any] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Progress = lambda done, total: None,
        chunk: int | None = None,
    ) -> None:
        if not prompt:
            raise OptionError("The prompt is empty: there is nothing to continue.")
        if max_tokens < 1:
            raise OptionError(f"max_tokens={max_tokens}: choose 1 or more.")
        self._model = model
        self._prompt = list(prompt)
        self._max_tokens = max_tokens
        self._sample = sampling.sampler()
        self._processors = sampling.processors()
        self._stop_tokens = stop_tokens
        self._cache = model.make_cache() if cache is None else cache
        self._cancelled = cancelled
        self._progress = progress
        self._chunk = chunk or prefill_chunk(model)
        self._watch = StopWatch(model, len(self._prompt))
        self.stats = self._watch.stats

    def __iter__(self) -> Iterator[int]:
        try:
            yield from self._tokens()
        finally:
            self._watch.update()

    def _tokens(self) -> Iterator[int]:
        if not self._prefill():
            self.stats.finish_reason = "cancelled"
            return
        tokens = list(self._prompt)
        for _ in range(self._max_tokens):
            if self._cancelled():
                self.stats.finish_reason = "cancelled"
                return
            token = self._next(tokens)
            tokens.append(token)
            self._watch.token()
            if token in self._stop_tokens:
                self.stats.finish_reason = "stop"
                return
            yield token
        self.stats.finish_reason = "length"

    def _prefill(self) -> bool:
        """All of the prompt but its last token, whose logits are the first wanted."""
        total = len(self._prompt)
        for start in range(0, total - 1, self._chunk):
            if self._cancelled():
                return False
            self._progress(start, total)
            part = self._prompt[start : min(start + self._chunk, total - 1)]
            self._model.advance(mx.array(part)[None], self._cache)
            mx.clear_cache()
        self._progress(total, total)
        return True

    def _next(self, tokens: list[int]) -> int:
        logits = self._model(mx.array(tokens[-1:])[None], cache=self._cache)[:, -1, :]
        if self._processors:
            history = mx.array(tokens)
            for process in self._processors:
                logits = process(history, logits)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return int(self._sample(log_probabilities).item())


def prefill_chunk(model: StreamedModel) -> int:
    """Tokens a chunk so that its routed rows stay within CHUNK_BYTES."""
    layout = model.streamer.store.layers[0].layout
    first = next(part for part in layout.parts if part.param == "weight")
    last = next(part for part in reversed(layout.parts) if part.param == "weight")
    # Rows of the first projection are the inner width, rows of the last the model's.
    row = 4 * (2 * first.shape[0] + 3 * last.shape[0]) * model.plan.experts_per_token
    largest = LARGEST_CHUNK if mx.metal.is_available() else LARGEST_UNROLLED_CHUNK
    power_of_two = 1 << max(CHUNK_BYTES // row, 1).bit_length() - 1
    return max(SMALLEST_CHUNK, min(largest, power_of_two))
