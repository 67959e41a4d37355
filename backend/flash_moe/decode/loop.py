"""The loop that makes tokens.

mlx-lm's own loop computes one token ahead, which hides the latency of a GPU; with experts on disk
it would cost a whole token of reads before the first word, and another for nothing at the end. So
this one computes a token when it is wanted, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.decode.constrained import Guide
from flash_moe.decode.prefill import Begin, Prefill, whole_chunks
from flash_moe.decode.sampling import Sampling
from flash_moe.decode.statistics import StopWatch
from flash_moe.errors import OptionError
from flash_moe.grammar.constraints import Constraint
from flash_moe.model.load import StreamedModel
from flash_moe.stream.choice import Occasion

Progress = Callable[[int, int], None]

# Every routed row of a chunk exists at once, in and out of the experts: 397B at bf16, K=10, has
# 0.3 MB a token. Larger chunks read fewer experts twice; 2048 is where mlx-lm stops, too.
CHUNK_BYTES = 96 << 20
LARGEST_CHUNK, SMALLEST_CHUNK = 2048, 16
# Without Metal, mlx-lm unrolls recurrent layers into a graph a token, 0.15 MB each; 2,000 tokens
# of a small model took 290 MB in one chunk, 90 MB in chunks of 512, at the same speed.
LARGEST_UNROLLED_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, how likely it was (natural logarithm), and the likeliest ones, the best first. As
    the sampler was given them: after penalties and masks, before temperature and top-p."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


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
        constraint: Constraint | None = None,
        likeliest: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Progress = lambda done, total: None,
        chunk: int | None = None,
        begin: Begin | None = None,
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
        self._cache = cache
        self._cancelled = cancelled
        self._progress = progress
        self._chunk = chunk or prefill_chunk(model)
        self._begin = begin or self._afresh
        self._watch = StopWatch(model, len(self._prompt))
        self.stats = self._watch.stats
        self._guide = Guide(constraint, self.stats)
        self._likeliest = likeliest
        # Of every token that was chosen, and not forced, if `likeliest` asks for them.
        self.choices: list[Choice] = []

    @property
    def allowed_masses(self) -> list[float]:
        """Of every token chosen under a mask: the probability that the mask left allowed."""
        return self._guide.masses

    def __iter__(self) -> Iterator[int]:
        # Here, so that what it takes to find a kept state is part of the reply's time.
        prefill = self._begin(self._prompt, self._chunk)
        self.stats.cached_tokens = prefill.cached
        try:
            yield from self._timed(prefill)
        except GeneratorExit:  # enough was read, so the prompt may well be continued
            self.stats.warning = prefill.finish()
            raise
        self.stats.warning = prefill.finish()

    def _timed(self, prefill: Prefill) -> Iterator[int]:
        try:
            yield from self._tokens(prefill)
        finally:
            self._watch.update()

    def _afresh(self, prompt: Sequence[int], chunk: int) -> Prefill:
        cache = self._model.make_cache() if self._cache is None else self._cache
        return Prefill(whole_chunks(len(prompt), chunk), cache)

    def _tokens(self, prefill: Prefill) -> Iterator[int]:
        if not self._advance(prefill):
            self.stats.finish_reason = "cancelled"
            return
        tokens, room = list(self._prompt), self._max_tokens
        computed = prefill.ends[-1] if prefill.ends else prefill.cached
        while room:
            if self._cancelled():
                self.stats.finish_reason = "cancelled"
                return
            # Tokens without a choice wait for the next one with: they go through the model
            # together with it, and share the experts that are read.
            step = self._guide.forced(room)
            if not step:
                if self._guide.finished:
                    break
                token = self._next(tokens, computed, prefill.cache)
                computed = len(tokens)
                step = [token] if self._guide.accept(token) else []
            for token in step:
                tokens.append(token)
                room -= 1
                self._watch.token()
                if token in self._stop_tokens:
                    self.stats.finish_reason = "stop"
                    return
                yield token
        self.stats.finish_reason = "stop" if self._guide.finished else "length"

    def _advance(self, prefill: Prefill) -> bool:
        """Read the prompt chunk by chunk; False if that was cancelled."""
        total, start = len(self._prompt), prefill.cached
        self._model.streamer.occasion = "prompt"
        for end in prefill.ends:
            if self._cancelled():
                return False
            self._progress(start, total)
            self._model.advance(mx.array(self._prompt[start:end])[None], prefill.cache)
            prefill.reached(end, prefill.cache)
            mx.clear_cache()
            start = end
        self._progress(total, total)
        return True

    def _occasion(self, computed: int) -> Occasion:
        if computed < len(self._prompt):
            return "prompt"
        return "grammar" if self._guide.holds else "reply"

    def _next(self, tokens: list[int], computed: int, cache: list[Any]) -> int:
        """The token after all of `tokens`, of which the first `computed` are in the cache."""
        self._model.streamer.occasion = self._occasion(computed)
        while len(tokens) - computed > self._chunk:
            part = tokens[computed : computed + self._chunk]
            self._model.advance(mx.array(part)[None], cache)
            computed += self._chunk
        logits = self._model(mx.array(tokens[computed:])[None], cache=cache)[:, -1, :]
        if self._processors:
            history = mx.array(tokens)
            for process in self._processors:
                logits = process(history, logits)
        logits = self._guide.restrict(logits)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = int(self._sample(log_probabilities).item())
        if self._likeliest is not None:
            self.choices.append(_choice(log_probabilities[0], token, self._likeliest))
        return token


def _choice(log_probabilities: mx.array, token: int, count: int) -> Choice:
    values = np.array(log_probabilities.astype(mx.float32))
    best = np.argsort(-values, kind="stable")[:count]
    return Choice(token, float(values[token]), [(int(i), float(values[i])) for i in best])


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
